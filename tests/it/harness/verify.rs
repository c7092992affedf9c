//! Whether what is on a machine is what the archive signed: signature, index, every package. Shares no code with poolfs.

use super::machine::Machine;
use super::process::run;
use super::repo::hex;
use super::stage::listed;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Fails unless each InRelease has a good signature, each Packages is the one that it names, and each package in `archives/` is
/// one that they name. Returns how many packages there are.
#[track_caller]
pub(crate) fn assert_as_signed(machine: &Machine) -> usize {
    let lists = machine.lists();
    let names = listed(&lists);
    let mut signed: HashMap<String, String> = HashMap::new();
    for release in names.iter().filter(|name| name.ends_with("_InRelease")) {
        let path = lists.join(release);
        run(Command::new("gpgv").arg("--keyring").arg(machine.keyring()).arg(&path)).ok();
        let text = fs::read_to_string(&path).unwrap();
        let digests = digests_of_release(&text);
        let prefix = release.trim_end_matches("InRelease");
        for index in names.iter().filter(|name| name.starts_with(prefix) && name.ends_with("_Packages")) {
            let bytes = fs::read(lists.join(index)).unwrap();
            let entry = index[prefix.len()..].replace('_', "/");
            let found = hex(&Sha256::digest(&bytes));
            assert_eq!(digests.get(entry.as_str()).copied(), Some(found.as_str()), "{index} is not what {release} names");
            signed.extend(packages(&String::from_utf8_lossy(&bytes)));
        }
    }
    let debs: Vec<String> = listed(&machine.archives()).into_iter().filter(|name| name.ends_with(".deb")).collect();
    for deb in &debs {
        let digest = digest_of(&machine.archives().join(deb));
        assert_eq!(signed.get(deb), Some(&digest), "{deb} on the machine below {} is not what the signed index names", lists.display());
    }
    debs.len()
}

fn digest_of(path: &Path) -> String {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
    std::io::copy(&mut file, &mut HashWriter(&mut hash)).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    hex(&hash.finalize())
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Path below the suite to SHA-256.
fn digests_of_release(text: &str) -> HashMap<&str, &str> {
    let section = text.lines().skip_while(|line| *line != "SHA256:").skip(1).take_while(|line| line.starts_with(' '));
    section
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let digest = words.next()?;
            Some((words.nth(1)?, digest))
        })
        .collect()
}

/// Name in `archives/` to SHA-256.
fn packages(index: &str) -> impl Iterator<Item = (String, String)> {
    index.split("\n\n").filter_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let version = field("Version")?.replace(':', "%3a");
        Some((format!("{}_{version}_{}.deb", field("Package")?, field("Architecture")?), field("SHA256")?.to_owned()))
    })
}
