//! Packets with descriptors.

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Bytes of a packet, the first of which says where the value is. Well below what a socket's buffer holds by default.
const PACKET_BYTES_MAX: usize = 32 * 1024;

/// Bytes of a value that goes in a memfd.
const BODY_BYTES_MAX: u64 = 16 << 20;

/// Descriptors of one packet: a value's memfd and two of the value itself.
const FDS_MAX: usize = 3;

/// Packets that wait to be sent; who has more waits, or is told that the other side does not keep up.
const PACKETS_WAITING_MAX: usize = 512;

/// Pause before a packet that the system would not take is sent again.
const CROWDED_PAUSE: Duration = Duration::from_millis(10);

/// The value follows in the packet.
const INLINE: u8 = 0;
/// The value is in the first descriptor.
const IN_MEMORY: u8 = 1;

/// The seals without which the sender could change what is being read.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK);

/// Why nothing more comes over a wire.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side closed it.
    #[error("it closed its end")]
    Closed,
    /// What came is not of this protocol.
    #[error("it sent garbage: {0}")]
    Garbage(String),
    /// It says why it cannot run.
    #[error("it cannot run: {0}")]
    Refused(String),
    /// Nothing came for so many seconds.
    #[error("it said nothing for {0} s, and was ended")]
    Silent(u64),
    /// The system does not let it through.
    #[error("its socket failed: {0}")]
    Failed(io::Error),
}

impl WireError {
    /// Something that is not of this protocol.
    pub fn garbage(what: impl Into<String>) -> Self {
        Self::Garbage(what.into())
    }
}

/// The two ends of a wire.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// A sealed memfd with these bytes.
pub fn seal(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut memory = File::from(memfd_create("poolfs-wire", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    memory.write_all(bytes)?;
    fcntl_add_seals(&memory, SEALS | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// A memfd that came over the wire and whose bytes nobody can change.
#[derive(Debug)]
pub struct Memory {
    file: File,
    bytes: u64,
}

impl Memory {
    /// Checks the seals and the size, in this order: only memory has seals, and looking at another's file could block.
    pub fn check(memory: OwnedFd, bytes_max: u64) -> Result<Self, WireError> {
        let sealed = fcntl_get_seals(&memory).is_ok_and(|seals| seals.contains(SEALS));
        if !sealed {
            return Err(WireError::garbage("a descriptor that is no sealed memory"));
        }
        let bytes = fstat(&memory).ok().and_then(|found| u64::try_from(found.st_size).ok());
        match bytes.filter(|bytes| *bytes <= bytes_max) {
            Some(bytes) => Ok(Self { file: memory.into(), bytes }),
            None => Err(WireError::garbage(format!("memory of more than {bytes_max} bytes"))),
        }
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// All of it.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

/// A packet on its way.
#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Packet {
    fn of(value: &impl Serialize, mut fds: Vec<OwnedFd>) -> io::Result<Self> {
        let mut bytes = vec![INLINE];
        serde_json::to_writer(&mut bytes, value)?;
        if bytes.len() > PACKET_BYTES_MAX {
            let body = &bytes[1..];
            if body.len() as u64 > BODY_BYTES_MAX {
                return Err(io::Error::other(format!("a value of {} bytes is too long for the network process", body.len())));
            }
            fds.insert(0, seal(body)?);
            bytes = vec![IN_MEMORY];
        }
        assert!(fds.len() <= FDS_MAX, "a packet has at most {FDS_MAX} descriptors");
        Ok(Self { bytes, fds })
    }

    fn open<T: DeserializeOwned>(mut self) -> Result<(T, Vec<OwnedFd>), WireError> {
        let value = |body: &[u8]| serde_json::from_slice(body).map_err(|err| WireError::garbage(format!("no message: {err}")));
        let value = match self.bytes.split_first() {
            Some((&INLINE, body)) => value(body)?,
            Some((&IN_MEMORY, [])) if !self.fds.is_empty() => {
                let memory = Memory::check(self.fds.remove(0), BODY_BYTES_MAX)?;
                value(&memory.read().map_err(WireError::Failed)?)?
            }
            _ => return Err(WireError::garbage("a packet of no known kind")),
        };
        Ok((value, self.fds))
    }
}

/// One end of a wire.
#[derive(Debug)]
pub struct Socket {
    fd: Arc<AsyncFd<OwnedFd>>,
    buffer: Vec<u8>,
}

impl Socket {
    /// Takes an end; needs a runtime around it.
    pub fn new(end: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&end, true)?;
        Ok(Self { fd: Arc::new(crate::sys::watched(end)?), buffer: vec![0; PACKET_BYTES_MAX] })
    }

    /// The next value and its descriptors. May be dropped at any time without losing one.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), WireError> {
        let buffer = &mut self.buffer;
        self.fd.async_io(Interest::READABLE, |fd| Ok(receive(fd.as_fd(), buffer)?)).await.map_err(WireError::Failed)??.open()
    }

    /// A queue to this end, whose values are sent in their order until all of its clones are dropped or the wire is closed.
    pub fn outlet(&self) -> Outlet {
        let (packets, waiting) = mpsc::channel(PACKETS_WAITING_MAX);
        tokio::spawn(send_all(Arc::clone(&self.fd), waiting));
        Outlet { packets }
    }
}

/// The first value of a wire and its descriptors, before there is a runtime: waits for it.
pub fn first<T: DeserializeOwned>(end: &OwnedFd) -> Result<(T, Vec<OwnedFd>), WireError> {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    loop {
        let failed = |err: Errno| WireError::Failed(err.into());
        match receive(end.as_fd(), &mut buffer) {
            Ok(packet) => return packet?.open(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match rustix::event::poll(&mut [PollFd::new(end, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(failed(err)),
            },
            Err(err) => return Err(failed(err)),
        }
    }
}

/// Sends a last value, if there is room for it.
pub fn last(end: &OwnedFd, value: &impl Serialize) -> io::Result<()> {
    Ok(send(end.as_fd(), &Packet::of(value, Vec::new())?)?)
}

/// What was received: an error of the system, or the other side's.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Result<Packet, WireError>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC) {
        Err(Errno::CONNRESET) => return Ok(Err(WireError::Closed)),
        got => got?,
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Ok(Err(WireError::garbage("a packet that is too long or has too many descriptors")));
    }
    if got.bytes == 0 {
        return Ok(Err(WireError::Closed));
    }
    Ok(Ok(Packet { bytes: buffer[..got.bytes].to_vec(), fds }))
}

async fn send_all(fd: Arc<AsyncFd<OwnedFd>>, mut waiting: mpsc::Receiver<Packet>) {
    while let Some(packet) = waiting.recv().await {
        loop {
            match fd.async_io(Interest::WRITABLE, |fd| Ok(send(fd.as_fd(), &packet)?)).await {
                Ok(()) => break,
                // Too many descriptors of one user are under way, which no readiness tells the end of.
                Err(err) if err.raw_os_error() == Some(Errno::TOOMANYREFS.raw_os_error()) => tokio::time::sleep(CROWDED_PAUSE).await,
                Err(err) => {
                    // Who receives at this end sees the same, and says what it means.
                    tracing::debug!("the wire is closed: {err}");
                    return;
                }
            }
        }
    }
}

fn send(socket: BorrowedFd<'_>, packet: &Packet) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket, &[IoSlice::new(&packet.bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// A queue to the other side. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outlet {
    packets: mpsc::Sender<Packet>,
}

impl Outlet {
    /// Sends a value as soon as there is room. An error: the wire is closed, or the value is too long for it.
    pub async fn send(&self, value: &impl Serialize, fds: Vec<OwnedFd>) -> io::Result<()> {
        let packet = Packet::of(value, fds)?;
        self.packets.send(packet).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends a value if there is room now.
    pub fn try_send(&self, value: &impl Serialize, fds: Vec<OwnedFd>) -> io::Result<()> {
        let packet = Packet::of(value, fds)?;
        self.packets.try_send(packet).map_err(|err| match err {
            TrySendError::Full(_) => io::ErrorKind::WouldBlock.into(),
            TrySendError::Closed(_) => io::ErrorKind::BrokenPipe.into(),
        })
    }
}
