//! What the daemon does for `ls`, `gc` and `config reload`.

use super::Daemon;
use crate::config::{Config, keys};
use crate::control::{Collected, FileRow, Reloaded, Reply};
use crate::logging;
use crate::manners::LOOK_INTERVAL;
use anyhow::{Context, Result};
use poolfs_core::Role;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;

/// Files told in one reply.
const ROWS_MAX: usize = 256;

impl Daemon {
    /// Every file of the database, some at a time.
    pub(super) async fn list(self: Arc<Self>, replies: mpsc::Sender<Reply>) -> Result<()> {
        tokio::task::spawn_blocking(move || {
            let mut rows = Vec::new();
            let mut gone = false;
            let mut tell = |row: Option<FileRow>| {
                let ended = row.is_none();
                rows.extend(row);
                if !rows.is_empty() && (ended || rows.len() >= ROWS_MAX) && !gone {
                    gone = replies.blocking_send(Reply::Files(std::mem::take(&mut rows))).is_err();
                }
            };
            for role in [Role::Archives, Role::Lists] {
                self.store.each_file(role, |path, record| {
                    tell(Some(FileRow {
                        place: role.to_string(),
                        name: String::from_utf8_lossy(path).into_owned(),
                        digest: record.digest.map(|digest| digest.to_string()),
                        bytes: record.stamp.size,
                        state: record.state.to_string(),
                        sharing: record.sharing.to_string(),
                        source: Some(record.provenance.to_string()),
                    }));
                })?;
            }
            let mut objects = Vec::new();
            self.objects.each(|digest, bytes, sharing| objects.push((*digest, bytes, sharing)))?;
            for (digest, bytes, sharing) in objects {
                let entry = self.catalog.by_digest(&digest)?;
                tell(Some(FileRow {
                    place: "objects".to_owned(),
                    name: entry.map_or_else(|| digest.to_string(), |entry| entry.name),
                    digest: Some(digest.to_string()),
                    bytes,
                    state: "clean".to_owned(),
                    sharing: sharing.to_string(),
                    source: None,
                }));
            }
            tell(None);
            Ok(())
        })
        .await
        .context("list the files")?
    }

    /// Frees what is over the quota and what nobody came back for; with `all`, whatever can be fetched again.
    pub(super) fn collect(&self, all: bool) -> Result<Collected> {
        let evicted = if all { self.objects.make_room(u64::MAX)? } else { self.objects.evict()? };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let before = match all {
            true => i64::MAX,
            false => i64::try_from(now.saturating_sub(super::INCOMING_KEPT).as_secs()).unwrap_or_default(),
        };
        let downloads = self.incoming.discard_older(before)?;
        Ok(Collected { objects: evicted.files, objects_bytes: evicted.bytes, downloads, kept_bytes: self.objects.bytes() })
    }

    /// Gives as much as the hour and the connection allow. Goes on for ever.
    pub(super) async fn mind_manners(self: Arc<Self>) {
        loop {
            self.manners.look().await;
            self.give_by_manners();
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn give_by_manners(&self) {
        self.process.set_upload(self.manners.now().upload_bytes_s);
    }

    /// Reads the configuration again and takes over what can be, all of it or, where a value is wrong, nothing.
    pub(super) fn reload(&self) -> Result<Reloaded> {
        let new = Config::load(self.config.origin.file.as_deref())?;
        let mut last = self.read_last.lock();
        let changed = last.changed(&new.origin);
        // What waits was read before, perhaps, and waits still.
        let waiting = self.config.origin.changed(&new.origin).into_iter().filter(|key| !keys::RELOADED.contains(&key.as_str())).collect();
        let taken: Vec<String> = changed.into_iter().filter(|key| keys::RELOADED.contains(&key.as_str())).collect();
        let has = |start: &str| taken.iter().any(|key| key.starts_with(start));
        if has("log.") {
            logging::set(&new.log.level)?;
            self.process.log(&new.log.level);
        }
        if has("store.quota") {
            self.objects.set_quota(new.store.quota);
            self.objects.evict()?;
        }
        if has("net.") {
            self.manners.set(new.net.clone());
            self.give_by_manners();
        }
        if has("apt.") {
            self.names.set_apt(new.apt.clone());
            self.mounts.lock().refresh();
        }
        *last = new.origin;
        let reloaded = Reloaded { taken, waiting };
        tracing::info!("configuration read again; taken over: {}", words(&reloaded.taken));
        if !reloaded.waiting.is_empty() {
            tracing::warn!("cannot be changed while it runs, and wait for the next start: {}", words(&reloaded.waiting));
        }
        Ok(reloaded)
    }
}

/// Keys for people.
fn words(keys: &[String]) -> String {
    if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") }
}
