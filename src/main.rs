//! `poolfs`: a FUSE filesystem over apt's caches whose files arrive from peers.
#![allow(unreachable_pub, reason = "a binary has no public interface: pub marks what its other modules use")]

mod advisories;
mod announcer;
#[allow(dead_code, reason = "used where the daemon wires its parts")]
mod apt_names;
mod bridge;
mod cli;
mod clock;
mod commands;
mod config;
mod config_cmd;
mod confine;
mod control;
mod daemon;
mod delta_cmd;
mod deltas;
mod dht_cmd;
mod doctor;
mod documents;
mod errands;
mod facts;
mod files_cmd;
mod holdings;
mod lists_age;
mod logging;
mod manners;
mod mount_helper;
mod mount_words;
mod net_main;
mod net_process;
mod net_side;
mod peers_cmd;
mod pid_file;
mod quiet;
mod shelf;
mod show;
mod supervise;
mod sys;
mod web;
mod wire;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if let Some(name) = mount_helper::is_called_so(std::env::args_os().next().as_ref()) {
        return mount_helper::main(name, &mut arguments);
    }
    match commands::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(err) => {
            show::error(&err);
            ExitCode::FAILURE
        }
    }
}
