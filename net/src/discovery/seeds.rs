//! DNS: SRV records of seeds, addresses of hosts.

use super::{DEFAULT_PORT, HostPort, Origin};
use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use hickory_resolver::{Resolver, TokioResolver};
use std::net::SocketAddr;
use std::time::Duration;

/// SRV targets taken from one seed, by priority.
pub(super) const TARGETS_MAX: usize = 16;

/// Addresses taken from one origin.
pub(super) const ADDRESSES_MAX: usize = 64;

/// How long one origin may take, with all its records.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one name server may take to answer, and how often it is asked.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
const QUERY_ATTEMPTS: usize = 2;

/// Why an origin gave no address.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The system's resolver configuration cannot be read, or the name server failed.
    #[error("resolve {what}: {source}")]
    Dns {
        /// The name asked for.
        what: String,
        /// The resolver's word for it.
        source: NetError,
    },
    /// The system's resolver failed.
    #[error("resolve {what}: {source}")]
    System {
        /// The host asked for.
        what: String,
        /// The system's word for it.
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("resolve {what}: no answer within {} s", RESOLVE_TIMEOUT.as_secs())]
    Timeout {
        /// The origin.
        what: String,
    },
}

/// Asks DNS for nodes. Cheap to make: it reads the system's configuration anew at each question.
#[derive(Debug, Clone, Default)]
pub struct Seeds {
    name_servers: Vec<SocketAddr>,
}

impl Seeds {
    /// Asks `name_servers`, or the system's if there are none.
    pub fn new(name_servers: Vec<SocketAddr>) -> Self {
        Self { name_servers }
    }

    /// The origin's addresses, at most 64; an empty list if it exists and has none.
    pub async fn resolve(&self, origin: &Origin) -> Result<Vec<SocketAddr>, SeedError> {
        let answer = async {
            match origin {
                Origin::Bootstrap(host) => resolve_host(host).await,
                Origin::Seed(name) => self.resolve_seed(name).await,
            }
        };
        let mut found =
            tokio::time::timeout(RESOLVE_TIMEOUT, answer).await.map_err(|_| SeedError::Timeout { what: origin.to_string() })??;
        found.truncate(ADDRESSES_MAX);
        Ok(found)
    }

    async fn resolve_seed(&self, name: &str) -> Result<Vec<SocketAddr>, SeedError> {
        let resolver = self.resolver(name)?;
        let name = name.trim_end_matches('.');
        let service = format!("_poolfs._udp.{name}.");
        let mut targets: Vec<(u16, String, u16)> = Vec::new();
        match resolver.srv_lookup(service.as_str()).await {
            Ok(lookup) => targets.extend(lookup.answers().iter().filter_map(|record| match &record.data {
                // RFC 2782: a lone target "." says that the service is decidedly not offered.
                RData::SRV(srv) if !srv.target.is_root() && srv.port != 0 => Some((srv.priority, srv.target.to_utf8(), srv.port)),
                _ => None,
            })),
            Err(err) if err.is_no_records_found() => targets.push((0, format!("{name}."), DEFAULT_PORT)),
            Err(source) => return Err(SeedError::Dns { what: service, source }),
        }
        targets.sort();
        targets.truncate(TARGETS_MAX);
        let mut found = Vec::new();
        let mut failed = None;
        for (_, target, port) in targets {
            match resolver.lookup_ip(target.as_str()).await {
                Ok(lookup) => found.extend(lookup.iter().map(|ip| SocketAddr::new(ip, port))),
                Err(err) if err.is_no_records_found() => {}
                Err(source) => failed = Some(SeedError::Dns { what: target, source }),
            }
            if found.len() >= ADDRESSES_MAX {
                break;
            }
        }
        match failed {
            Some(err) if found.is_empty() => Err(err),
            _ => Ok(found),
        }
    }

    fn resolver(&self, what: &str) -> Result<TokioResolver, SeedError> {
        let failed = |source| SeedError::Dns { what: what.to_owned(), source };
        let mut builder = if self.name_servers.is_empty() {
            TokioResolver::builder_tokio().map_err(failed)?
        } else {
            let servers = self.name_servers.iter().map(|server| {
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                    connection.port = server.port();
                    connection
                });
                NameServerConfig::new(server.ip(), true, connections.into())
            });
            Resolver::builder_with_config(ResolverConfig::from_name_servers(servers.collect()), TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.timeout = QUERY_TIMEOUT;
        options.attempts = QUERY_ATTEMPTS;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        builder.build().map_err(failed)
    }
}

/// By the system's own resolver, so that a configured host may come from `/etc/hosts`, NIS or mDNS.
async fn resolve_host(host: &HostPort) -> Result<Vec<SocketAddr>, SeedError> {
    match tokio::net::lookup_host((host.host.as_str(), host.port)).await {
        Ok(found) => Ok(found.collect()),
        Err(source) => Err(SeedError::System { what: host.to_string(), source }),
    }
}
