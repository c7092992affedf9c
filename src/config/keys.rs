//! Every key of the configuration: its default, its unit and what it means. The one place that says so: unknown keys are
//! found by it, and the annotated file is printed from it.

use std::fmt::Write as _;

/// A section of the file.
pub struct Section {
    /// Between the brackets.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Its keys, in the order in which they are explained.
    pub keys: &'static [Key],
}

/// One key.
pub struct Key {
    /// Before the `=`.
    pub name: &'static str,
    /// The default as TOML; for a key that has none, an example.
    pub value: &'static str,
    /// Whether `value` is what holds without the key; otherwise it is an example.
    pub is_default: bool,
    /// What it means, with the unit.
    pub about: &'static str,
}

const fn key(name: &'static str, value: &'static str, about: &'static str) -> Key {
    Key { name, value, is_default: true, about }
}

const fn unset(name: &'static str, value: &'static str, about: &'static str) -> Key {
    Key { name, value, is_default: false, about }
}

/// Every section and key that may stand in the file.
pub const SECTIONS: &[Section] = &[
    Section {
        name: "mount",
        about: "The directories that `poolfs up` mounts over, one [[mount]] each; lines of fstab need none of these.",
        keys: &[
            key("role", "\"archives\"", "What the directory is to apt: \"archives\" or \"lists\", each once."),
            key("path", "\"/var/cache/apt/archives\"", "The directory; its files stay in it."),
            unset("options", "[\"noatime\"]", "As in fstab: ro, browse, nosuid, nodev, noexec, noatime."),
        ],
    },
    Section {
        name: "store",
        about: "poolfs's own directories.",
        keys: &[
            key("state_dir", "\"/var/lib/poolfs\"", "The database, and the log of a daemon that was started behind."),
            key(
                "cache_dir",
                "\"/var/cache/poolfs\"",
                "Downloads in progress, and packages kept after apt removed them; best on the file system of apt's directories.",
            ),
            key("quota", "\"5 GiB\"", "Bytes that kept packages may take: a number, or text with kB, MB, GB, KiB, MiB, GiB."),
        ],
    },
    Section {
        name: "control",
        about: "How the commands reach the daemon.",
        keys: &[key("socket", "\"/run/poolfs/control.sock\"", "A Unix socket for root only; at most 107 bytes long.")],
    },
    Section {
        name: "apt",
        about: "Where apt's own configuration is.",
        keys: &[
            key("sources", "[]", "sources.list and .sources files, or directories of them; empty: apt's own."),
            unset("config", "\"/etc/apt/apt.conf\"", "A file used as APT_CONFIG where apt's configuration is asked for."),
            key(
                "private",
                "[]",
                "What never leaves this machine, besides repositories with credentials: patterns like \"origin=ACME*\", \"url=https://repo.example/internal\", \"suite=*-staging,component=secret\", \"package=acme-*\".",
            ),
            key(
                "advisories",
                "[]",
                "Files or URLs of advisories: the Debian security tracker's JSON, or debsecan's format. Versions that they name are kept from strangers.",
            ),
            key("advisories_unfixed", "false", "Whether they are also where nothing fixes the issue yet."),
        ],
    },
    Section {
        name: "fs",
        about: "How the mounts behave.",
        keys: &[
            key("lazy_archives", "true", "Whether programs other than apt find packages in archives/ that are not there yet."),
            key("threads", "2", "FUSE threads of each mount, 1 to 64."),
        ],
    },
    Section {
        name: "mirror",
        about: "Patience with the mirror.",
        keys: &[
            key("connect_timeout_s", "10", "Seconds until a connection must stand."),
            key("first_byte_timeout_s", "30", "Seconds from the request to the first byte of the answer."),
            key("stall_timeout_s", "30", "Seconds without a byte after which a connection is given up."),
            key("rate_min_bytes_s", "1024", "Bytes a second; a slower transfer is given up, and apt fetches the file itself."),
        ],
    },
    Section {
        name: "net",
        about: "Peers.",
        keys: &[
            key("listen", "\"[::]:9977\"", "Address and port, above 1023: TCP for pieces, UDP for the DHT."),
            key("bootstrap", "[]", "Nodes to join the DHT by, each \"HOST:PORT\"."),
            key("seeds", "[]", "DNS names that list nodes: SRV records of _poolfs._udp, else addresses."),
            unset("discovery", "true", "Look for other machines on the link; unset: only where network is \"private\"."),
            key("network", "\"private\"", "\"private\": a LAN; \"public\": believe addresses of the internet."),
            key(
                "announce",
                "\"large\"",
                "What the DHT is told of, at most 600 files: \"large\" (over 512 KiB), \"all\", \"pieces\", \"none\".",
            ),
            unset(
                "security_from",
                "\"fleet\"",
                "Who is asked for updates of a security suite, beside the mirror: \"fleet\", or \"all\"; unset: \"fleet\" where network is \"public\".",
            ),
            key(
                "upload_bytes_s",
                "\"2 MB\"",
                "Bytes a second to all outside of the machine's own networks; inside there is no limit. 0: nothing.",
            ),
            key("upload_slots", "8", "Answers under way to them at once; who comes when it is full is told to come back."),
            key(
                "quiet_hours",
                "[]",
                "When nothing is given to them, in local time: \"22:00-06:00\", \"Mon-Fri 08:00-18:00\". What is under way ends.",
            ),
            key(
                "metered",
                "\"auto\"",
                "Whether the connection is paid by the byte, so that nothing is given to them: \"auto\" (as NetworkManager says), \"yes\", \"no\".",
            ),
            key(
                "lan_only",
                "false",
                "true: no datagram and no connection to or from anybody who is on none of this machine's links; mirrors and name servers excepted.",
            ),
            key(
                "deltas",
                "\"auto\"",
                "Whether a package is made from an older version that is here and a delta: \"auto\" where that is sooner, \"always\" where it is fewer bytes, \"off\". With \"off\" none is made or offered either, which would tell that an older version was here.",
            ),
            key("delta_percent_max", "50", "A delta is offered if it has less than so many hundredths of its package, 1 to 100."),
            key("delta_bytes_max", "\"64 MiB\"", "Bytes that a delta may have at most; more than 64 MiB are never taken."),
            key(
                "delta_priority",
                "\"idle\"",
                "Processor and disk for making them: \"idle\": what nobody else wants, \"normal\": as every other process, for a machine that is never idle.",
            ),
        ],
    },
    Section {
        name: "fleet",
        about: "Machines that share out what the mirror is asked for.",
        keys: &[
            unset("key_file", "\"/etc/poolfs/fleet.key\"", "The key that they share: 32 bytes, or 64 hexadecimal digits; unset: no fleet."),
            key("seeds", "[]", "DNS names that list members, as in [net]."),
            key("zone", "\"\"", "This machine's site, at most 32 bytes; holders of the same one are asked first."),
            key("zone_local", "false", "true: one copy from the mirror for each zone, instead of one for all."),
            key("gateway", "false", "true: announce files outside of the fleet too."),
        ],
    },
    Section {
        name: "status",
        about: "The status page and the metrics for Prometheus, over HTTP.",
        keys: &[key("listen", "\"127.0.0.1:9978\"", "A loopback address and port; \"\": neither is served.")],
    },
    Section {
        name: "log",
        about: "What is logged.",
        keys: &[key(
            "level",
            "\"info\"",
            "error, warn, info, debug, trace, or by part: \"poolfs_fs=debug,info\"; POOLFS_LOG overrides it.",
        )],
    },
];

/// Keys that a daemon takes over when it is told to read its configuration again; all others wait for the next start.
pub const RELOADED: &[&str] =
    &["apt.sources", "apt.config", "apt.private", "store.quota", "net.upload_bytes_s", "net.quiet_hours", "net.metered", "log.level"];

/// The longest line of the annotated file.
const WIDTH: usize = 120;

/// The annotated file: every key, commented out, with its default.
pub fn annotated() -> String {
    let mut text = String::from(
        "# Configuration of poolfs. Every key is here with its default; a line without its `#` is set.\n\
         # An unknown key is an error. `poolfs config check` looks at the file, `poolfs config show` prints what holds.\n\
         # Marked (reload): taken over by `poolfs config reload` or SIGHUP; the others by the next start.\n",
    );
    for section in SECTIONS {
        let brackets = if section.name == "mount" { ["[[", "]]"] } else { ["[", "]"] };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n# {}\n#{}{}{}", section.about, brackets[0], section.name, brackets[1]);
        keys_of(section, &mut text);
        if section.name == "mount" {
            text.push_str("#\n#[[mount]]\n#role = \"lists\"\n#path = \"/var/lib/apt/lists\"\n");
        }
    }
    text
}

fn keys_of(section: &Section, text: &mut String) {
    for key in section.keys {
        let reload = if RELOADED.contains(&format!("{}.{}", section.name, key.name).as_str()) { " (reload)" } else { "" };
        let unset = if key.is_default { "" } else { " Not set by default." };
        let mut line = String::from("#");
        for word in format!("{}{unset}{reload}", key.about).split(' ') {
            if line.len() + 1 + word.len() > WIDTH {
                let _ = writeln!(text, "{line}");
                line = String::from("#");
            }
            line.push(' ');
            line.push_str(word);
        }
        // An example has a blank, so that taking every `#` away sets the defaults and nothing else.
        let mark = if key.is_default { "#" } else { "# " };
        let _ = writeln!(text, "{line}\n{mark}{} = {}", key.name, key.value);
    }
}
