//! What was typed.

use clap::{Args, Parser, Subcommand};
use poolfs_core::Role;
use std::path::PathBuf;

/// A peer-to-peer package cache under apt: mounted over its two directories.
#[derive(Debug, Parser)]
#[command(name = "poolfs", version, propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Which configuration is meant; every command takes it.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// The configuration file [default: /etc/poolfs/poolfs.toml, built-in defaults if it is absent]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount the configured directories and serve them
    #[command(
        after_help = "Examples:\n  poolfs up\n  poolfs up --config ./poolfs.toml --foreground\n\nExit codes: 0 mounted (in the foreground: ended cleanly), 1 error"
    )]
    Up {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// Stay in the foreground and log to standard error
        #[arg(long)]
        foreground: bool,
    },
    /// Unmount everything and end the daemon; the directories are plain again
    #[command(after_help = "It waits 30 s for an apt that runs.\n\nExit codes: 0 unmounted and ended, 1 error")]
    Down {
        /// Which configuration
        #[command(flatten)]
        common: Common,
    },
    /// Mount one directory, by the daemon that runs or a new one
    #[command(
        after_help = "Examples:\n  poolfs mount archives /var/cache/apt/archives\n  poolfs mount archives /mnt -o ro,browse\n\nExit codes: 0 mounted, 1 error"
    )]
    Mount {
        /// What the directory is to apt: archives or lists
        #[arg(value_parser = role)]
        role: Role,
        /// The directory to mount over
        dir: PathBuf,
        /// Mount options, separated by commas: ro, rw, browse, suid, nosuid, dev, nodev, exec, noexec, atime, noatime
        #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
        options: Vec<String>,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// Stay in the foreground and log to standard error, with a daemon of its own
        #[arg(long)]
        foreground: bool,
    },
    /// Show what is mounted, what is here and where it came from
    #[command(
        after_help = "Examples:\n  poolfs status\n  poolfs status --json | jq .bytes\n\nExit codes: 0 shown, 1 error, also where no daemon answers"
    )]
    Status {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the peers that gave files: rate, failures, pieces, and what was proved of them
    #[command(after_help = "Examples:\n  poolfs peers\n  poolfs peers --statements\n\nExit codes: 0 shown, 1 error")]
    Peers {
        /// What this machine and others say of peers, and what came of it here
        #[arg(long)]
        statements: bool,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where a file came from: digest, sharing, and which piece came from whom
    #[command(
        after_help = "Examples:\n  poolfs why /var/cache/apt/archives/hello_2.10-3_amd64.deb\n\nExit codes: 0 shown, 1 error, also where no such file is here"
    )]
    Why {
        /// A file below a mount, or a digest
        file: PathBuf,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show downloads in progress until interrupted
    #[command(after_help = "Examples:\n  poolfs watch\n\nExit codes: 1 when the daemon ends; an interrupt ends it otherwise")]
    Watch {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// One JSON document a line instead of bars
        #[arg(long)]
        json: bool,
    },
    /// Read every file and check every block
    #[command(
        after_help = "Examples:\n  poolfs verify\n  poolfs verify --repair\n\nExit codes: 0 every block is right, 1 error, 2 damage is left"
    )]
    Verify {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// Fetch damaged pieces again and mend the files in place
        #[arg(long)]
        repair: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List the files that are here: directory, size, state, sharing, source
    #[command(
        after_help = "Examples:\n  poolfs ls\n  poolfs ls 'linux-image-*' --json\n\nExit codes: 0 listed, 1 error, 2 no file fits the pattern"
    )]
    Ls {
        /// Names or shell patterns (* and ?); all files without one
        patterns: Vec<String>,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// One JSON document a line for each file
        #[arg(long)]
        json: bool,
    },
    /// Put packages into the archives directory: from peers, from the mirror
    #[command(
        after_help = "Examples:\n  poolfs fetch hello\n  poolfs fetch hello=2.10-3 libc6:i386 bash/bookworm\n  poolfs fetch hello_2.10-3_amd64.deb\n\nExit codes: 0 all are here, 1 error, 2 some could not be had"
    )]
    Fetch {
        /// Packages as apt names them (NAME, NAME=VERSION, NAME/RELEASE, NAME:ARCHITECTURE), or names of archives
        #[arg(required = true)]
        names: Vec<String>,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// One JSON document a line for each package
        #[arg(long)]
        json: bool,
    },
    /// Free space: kept packages over the quota, downloads that nobody came back for
    #[command(after_help = "Examples:\n  poolfs gc\n  poolfs gc --all\n\nExit codes: 0 done, 1 error")]
    Gc {
        /// Also what is within the quota, and every interrupted download; files in apt's directories stay
        #[arg(long)]
        all: bool,
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what is wrong with this machine, and print the command that mends it
    #[command(
        after_help = "Examples:\n  poolfs doctor\n  poolfs doctor --json\n\nIt changes nothing. Exit codes: 0 nothing is wrong, 1 error, 2 something is"
    )]
    Doctor {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show, explain, check or reload the configuration
    Config(crate::config_cmd::ConfigArgs),
    /// Change what a running daemon logs, until it is started again
    #[command(after_help = "Examples:\n  poolfs log-level debug\n  poolfs log-level poolfs_net=trace,info\n\nExit codes: 0 done, 1 error")]
    LogLevel {
        /// error, warn, info, debug, trace, or directives as in log.level
        level: String,
        /// Which configuration
        #[command(flatten)]
        common: Common,
    },
    /// Look into the DHT, or run a node of it that mounts nothing
    Dht(crate::dht_cmd::DhtArgs),
    /// Make and apply deltas between packages at hand
    Delta(crate::delta_cmd::DeltaArgs),
    /// The process that makes or applies one delta
    #[command(hide = true)]
    DeltaWork,
    /// Write man pages and shell completions below a directory, for packages
    #[command(hide = true)]
    Documents {
        /// Gets `man/` and `completions/`
        dir: PathBuf,
    },
    /// The process that serves the mounts; started by `up`, which watches over it
    #[command(hide = true)]
    Serve {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// `ROLE DIR OPTIONS` instead of the configured mounts; may be repeated
        #[arg(long, num_args = 3)]
        only: Vec<String>,
    },
    /// The process that talks to the network; started by `serve`, by whose socket it does everything
    #[command(hide = true)]
    ServeNet {
        /// Its directory
        dir: PathBuf,
    },
}

fn role(word: &str) -> Result<Role, String> {
    Role::from_word(word).ok_or_else(|| format!("`{word}` is not a role: write archives or lists"))
}
