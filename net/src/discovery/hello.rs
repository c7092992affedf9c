//! The hello datagram, see [`crate::discovery`].

const MAGIC: &[u8; 15] = b"poolfs-1 hello\0";
const JOINING: u8 = 1;

/// Length of the part that this version knows.
const KNOWN_BYTES: usize = MAGIC.len() + 1 + 2 + 20;

/// A longer datagram is no hello of any version.
pub(crate) const HELLO_BYTES_MAX: usize = 512;

/// What a node says of itself on its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Nobody has answered it yet.
    pub joining: bool,
    /// Where it speaks KRPC, at the datagram's source address; never 0.
    pub port: u16,
    /// Its node id.
    pub id: [u8; 20],
}

impl Hello {
    /// The datagram.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(KNOWN_BYTES);
        out.extend_from_slice(MAGIC);
        out.push(if self.joining { JOINING } else { 0 });
        out.extend_from_slice(&self.port.to_be_bytes());
        out.extend_from_slice(&self.id);
        out
    }

    /// Reads a datagram from anybody. Unknown flags and a tail are ignored; `None` if it is no hello or its port is below 1024.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        if datagram.len() > HELLO_BYTES_MAX {
            return None;
        }
        let rest = datagram.strip_prefix(MAGIC)?;
        let (flags, rest) = rest.split_first()?;
        let (port, rest) = rest.split_first_chunk()?;
        let port = u16::from_be_bytes(*port);
        // A hello must not point others at a service of the sender's or of the system's.
        (port >= 1024).then_some(())?;
        Some(Self { joining: flags & JOINING != 0, port, id: *rest.first_chunk()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two versions of the program could not hear each other.
    #[test]
    fn bytes_are_golden() {
        let hello = Hello { joining: true, port: 9977, id: *b"abcdefghijklmnopqrst" };
        let bytes = b"poolfs-1 hello\0\x01\x26\xf9abcdefghijklmnopqrst";
        assert_eq!(hello.to_bytes(), bytes);
        assert_eq!(Hello::parse(bytes), Some(hello));
        let longer = [&bytes[..], &[0xff; HELLO_BYTES_MAX - KNOWN_BYTES]].concat();
        assert_eq!(Hello::parse(&longer), Some(hello), "a later version's tail is ignored");
    }

    /// Any host on the link can send anything to the group.
    #[test]
    fn others_are_refused() {
        let good = Hello { joining: false, port: 1024, id: [7; 20] }.to_bytes();
        assert!(Hello::parse(&good).is_some());
        for len in 0..good.len() {
            assert_eq!(Hello::parse(&good[..len]), None, "cut at {len}");
        }
        assert_eq!(Hello::parse(&[&good[..], &[0; HELLO_BYTES_MAX]].concat()), None, "too long");
        let low = Hello { joining: false, port: 1023, id: [7; 20] }.to_bytes();
        assert_eq!(Hello::parse(&low), None, "low port");
        assert_eq!(Hello::parse(&[&b"poolfs-2"[..], &good[8..]].concat()), None, "another protocol");
    }
}
