//! A document whose digest nobody knows beforehand, fetched whole into memory.

use super::{Mirror, chain};
use tokio::time::timeout;

impl Mirror {
    /// Fetches what is at `url`, at most `bytes_max` bytes, through `proxy` if there is one. Follows no redirect. The error is a
    /// reason for people, without the URL.
    pub async fn document(&self, url: &str, proxy: Option<&str>, bytes_max: u64) -> Result<Vec<u8>, String> {
        let slow = |what: &str| format!("{what} took too long");
        let sent = timeout(self.limits.first_byte, self.client(proxy)?.get(url).send());
        let mut response = sent.await.map_err(|_| slow("the answer"))?.map_err(|err| chain(err.without_url()))?;
        if !response.status().is_success() {
            return Err(format!("answers {}", response.status()));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) =
            timeout(self.limits.stall, response.chunk()).await.map_err(|_| slow("a part of it"))?.map_err(|err| chain(err.without_url()))?
        {
            if (bytes.len() + chunk.len()) as u64 > bytes_max {
                return Err(format!("has more than {bytes_max} bytes"));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}
