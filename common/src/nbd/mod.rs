//! The NBD protocol as bytes and values. Pure: no sockets, no clock, no files.
//!
//! Source: the NBD protocol document (`doc/proto.md` of the reference implementation). Spoken here: the fixed newstyle
//! handshake with the options `EXPORT_NAME`, `ABORT`, `LIST`, `INFO`, `GO` and `STRUCTURED_REPLY`, the commands `READ`, `WRITE`,
//! `DISC`, `FLUSH`, `TRIM` and `WRITE_ZEROES`, simple and structured replies. Everything else is refused as the document asks.
//!
//! ```text
//! server ▶ greeting ◀ client flags ◀ option… ▶ reply… ◀ GO ▶ infos, ACK │ ◀ request [payload] ▶ reply [data] …
//! ```
//!
//! Promises: a length is compared with its limit before anything is reserved for it; what a client sends never causes a panic;
//! a request that was found valid lies within the disk. Never: keeps more than [`OPTION_BYTES_MAX`] of a client's bytes.

#[cfg(test)]
mod tests;

/// Longest data of an option. Names are at most 4,096 bytes; the rest is room for a list of information requests.
pub const OPTION_BYTES_MAX: usize = 16 << 10;
/// Longest export name that the protocol knows.
const NAME_BYTES_MAX: usize = 4096;
/// Most bytes of one read or write: what the protocol lets a client assume that did not ask.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Block size that clients are told to prefer: a page.
const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Options that one client may send before it chooses an export; `qemu-img` sends three.
const OPTIONS_MAX: u32 = 1024;

const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
const REP_ERR_INVALID: u32 = (1 << 31) + 3;
const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

/// `HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN`.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;
/// `HAS_FLAGS | READ_ONLY | SEND_FLUSH | CAN_MULTI_CONN`.
const TRANSMISSION_FLAGS_READ_ONLY: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 8;
const TRANSMISSION_FLAG_DF: u16 = 1 << 7;

const COMMAND_FLAG_FUA: u16 = 1;
const COMMAND_FLAG_NO_HOLE: u16 = 2;
const COMMAND_FLAG_DF: u16 = 4;

/// Length of a request before its payload.
pub const REQUEST_BYTES: usize = 28;
/// Length of the client's first message.
const CLIENT_FLAGS_BYTES: usize = 4;
const OPTION_HEADER_BYTES: usize = 16;

/// What a client sent that ends its connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not NBD, or out of step.
    #[error("expected the magic {expected:#x} of {what}, found {found:#x}")]
    Magic {
        /// Of which message.
        what: &'static str,
        /// What it has to be.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// Flags that no version of the protocol has, or that were not offered.
    #[error("unknown client flags {found:#x}")]
    Flags {
        /// All flags of the client.
        found: u32,
    },
    /// Longer than allowed.
    #[error("{what} of {found} bytes, at most {limit} are taken")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// Length announced.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// No export of that name, asked for by the option that knows no error reply.
    #[error("no export is named \"{name}\"")]
    UnknownExport {
        /// The name, cut to what can be shown.
        name: String,
    },
    /// It talks on and on.
    #[error("more than {OPTIONS_MAX} options before the choice of an export")]
    TooManyOptions,
}

/// An error that a reply carries; numbers as the protocol has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// A write to what can only be read.
    NotPermitted = 1,
    /// The backing failed.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// A write beyond the end.
    NoSpace = 28,
    /// The server ends.
    Shutdown = 108,
}

/// One export, as the handshake shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportFacts {
    /// Its name.
    pub name: String,
    /// Its exact size in bytes.
    pub disk_bytes: u64,
    /// Whether clients are told that it can't be written. Whoever serves it still has to refuse those who write all the same.
    pub read_only: bool,
}

/// What the handshake came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// The export chosen.
    pub name: String,
    /// Replies to reads are structured.
    pub structured: bool,
}

/// What to do after a call of [`Handshake::handle`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandshakeStep {
    /// Send what was put out, and read on.
    More,
    /// Send what was put out; requests follow.
    Go(Negotiated),
    /// Send what was put out, and close.
    Abort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Options,
}

/// The server's half of the handshake with one client.
///
/// To be driven: send [`Handshake::greeting`]; then call [`Handshake::handle`] with all bytes that came and are not consumed
/// yet, until it says [`HandshakeStep::Go`].
#[derive(Debug)]
pub struct Handshake {
    exports: Vec<ExportFacts>,
    stage: Stage,
    no_zeroes: bool,
    structured: bool,
    options: u32,
}

impl Handshake {
    /// A handshake that offers `exports`. The empty name stands for the only one, where there is one.
    #[must_use]
    pub fn new(exports: Vec<ExportFacts>) -> Self {
        Self { exports, stage: Stage::ClientFlags, no_zeroes: false, structured: false, options: 0 }
    }

    /// What the server says first.
    #[must_use]
    pub fn greeting() -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        bytes
    }

    /// Takes what the client sent. Returns how many bytes of `input` were consumed and what to do; replies are appended to
    /// `out`. [`HandshakeStep::More`] with nothing consumed: more bytes are needed, never more than 16 KiB and a header.
    ///
    /// # Errors
    /// [`ProtocolError`]: close the connection.
    pub fn handle(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, HandshakeStep), ProtocolError> {
        match self.stage {
            Stage::ClientFlags => {
                let Some(flags) = input.first_chunk::<CLIENT_FLAGS_BYTES>() else {
                    return Ok((0, HandshakeStep::More));
                };
                let flags = u32::from_be_bytes(*flags);
                if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                    return Err(ProtocolError::Flags { found: flags });
                }
                self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
                self.stage = Stage::Options;
                Ok((CLIENT_FLAGS_BYTES, HandshakeStep::More))
            }
            Stage::Options => {
                let Some((header, rest)) = input.split_first_chunk::<OPTION_HEADER_BYTES>() else {
                    return Ok((0, HandshakeStep::More));
                };
                let found = be_u64(&header[..8]);
                if found != OPTION_MAGIC {
                    return Err(ProtocolError::Magic { what: "an option", expected: OPTION_MAGIC, found });
                }
                let (option, length) = (be_u32(&header[8..12]), be_u32(&header[12..16]) as usize);
                if length > OPTION_BYTES_MAX {
                    let (found, limit) = (length as u64, OPTION_BYTES_MAX as u64);
                    return Err(ProtocolError::TooLong { what: "an option", found, limit });
                }
                let Some(data) = rest.get(..length) else { return Ok((0, HandshakeStep::More)) };
                self.options += 1;
                if self.options > OPTIONS_MAX {
                    return Err(ProtocolError::TooManyOptions);
                }
                let step = self.option(option, data, out)?;
                Ok((OPTION_HEADER_BYTES + length, step))
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<HandshakeStep, ProtocolError> {
        match option {
            OPT_EXPORT_NAME => {
                let Some(export) = self.find(data) else {
                    let name = String::from_utf8_lossy(&data[..data.len().min(80)]).into_owned();
                    return Err(ProtocolError::UnknownExport { name });
                };
                out.extend_from_slice(&export.disk_bytes.to_be_bytes());
                out.extend_from_slice(&self.transmission_flags(&export).to_be_bytes());
                if !self.no_zeroes {
                    out.extend_from_slice(&[0; 124]);
                }
                return Ok(HandshakeStep::Go(Negotiated { name: export.name, structured: self.structured }));
            }
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Ok(HandshakeStep::Abort);
            }
            OPT_LIST if !data.is_empty() => reply(out, option, REP_ERR_INVALID, b"LIST takes no data"),
            OPT_LIST => {
                for export in &self.exports {
                    let mut entry = Vec::with_capacity(4 + export.name.len());
                    entry.extend_from_slice(&length_u32(export.name.len()).to_be_bytes());
                    entry.extend_from_slice(export.name.as_bytes());
                    reply(out, option, REP_SERVER, &entry);
                }
                reply(out, option, REP_ACK, &[]);
            }
            OPT_INFO | OPT_GO => return Ok(self.info(option, data, out)),
            OPT_STRUCTURED_REPLY if !data.is_empty() => {
                reply(out, option, REP_ERR_INVALID, b"STRUCTURED_REPLY takes no data");
            }
            OPT_STRUCTURED_REPLY => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            _ => reply(out, option, REP_ERR_UNSUP, &[]),
        }
        Ok(HandshakeStep::More)
    }

    /// `INFO` and `GO`: u32 length of the name, name, u16 number of requests, u16 requests.
    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> HandshakeStep {
        let parsed = data.split_first_chunk::<4>().and_then(|(length, rest)| {
            let length =
                usize::try_from(u32::from_be_bytes(*length)).ok().filter(|length| *length <= NAME_BYTES_MAX)?;
            let name = rest.get(..length)?;
            let (count, requests) = rest[length..].split_first_chunk::<2>()?;
            (requests.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some((name, requests))
        });
        let Some((name, requests)) = parsed else {
            reply(out, option, REP_ERR_INVALID, b"malformed request for information");
            return HandshakeStep::More;
        };
        let Some(export) = self.find(name) else {
            reply(out, option, REP_ERR_UNKNOWN, b"no such export");
            return HandshakeStep::More;
        };
        let mut facts = [0; 12];
        facts[..2].copy_from_slice(&INFO_EXPORT.to_be_bytes());
        facts[2..10].copy_from_slice(&export.disk_bytes.to_be_bytes());
        facts[10..].copy_from_slice(&self.transmission_flags(&export).to_be_bytes());
        reply(out, option, REP_INFO, &facts);
        let asked = |info: u16| requests.chunks_exact(2).any(|request| request == info.to_be_bytes());
        if asked(INFO_NAME) {
            let mut text = INFO_NAME.to_be_bytes().to_vec();
            text.extend_from_slice(export.name.as_bytes());
            reply(out, option, REP_INFO, &text);
        }
        if asked(INFO_BLOCK_SIZE) {
            let mut sizes = [0; 14];
            sizes[..2].copy_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
            sizes[2..6].copy_from_slice(&1_u32.to_be_bytes());
            sizes[6..10].copy_from_slice(&BLOCK_BYTES_PREFERRED.to_be_bytes());
            sizes[10..].copy_from_slice(&PAYLOAD_BYTES_MAX.to_be_bytes());
            reply(out, option, REP_INFO, &sizes);
        }
        reply(out, option, REP_ACK, &[]);
        if option == OPT_GO {
            return HandshakeStep::Go(Negotiated { name: export.name, structured: self.structured });
        }
        HandshakeStep::More
    }

    fn find(&self, name: &[u8]) -> Option<ExportFacts> {
        match (name, self.exports.as_slice()) {
            ([], [only]) => Some(only.clone()),
            _ => self.exports.iter().find(|export| export.name.as_bytes() == name).cloned(),
        }
    }

    fn transmission_flags(&self, export: &ExportFacts) -> u16 {
        let flags = if export.read_only { TRANSMISSION_FLAGS_READ_ONLY } else { TRANSMISSION_FLAGS };
        if self.structured { flags | TRANSMISSION_FLAG_DF } else { flags }
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length_u32(data.len()).to_be_bytes());
    out.extend_from_slice(data);
}

fn length_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn be_u64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn be_u32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// What a valid request asks for. Offsets and lengths lie within the disk, lengths are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Bytes of the disk, at most [`PAYLOAD_BYTES_MAX`].
    Read {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Bytes for the disk, at most [`PAYLOAD_BYTES_MAX`]; they follow.
    Write {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// To be durable before the reply.
        fua: bool,
    },
    /// Everything that completed before is to be durable.
    Flush,
    /// The bytes are not needed any more.
    Trim {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// To be durable before the reply.
        fua: bool,
    },
    /// The bytes are to be zero.
    WriteZeroes {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// To be durable before the reply.
        fua: bool,
        /// Space may be given back.
        may_punch: bool,
    },
    /// The client goes; no reply.
    Disconnect,
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// What it asks for, or the error to reply.
    pub command: Result<Command, Errno>,
    /// Bytes of payload that follow it, at most [`PAYLOAD_BYTES_MAX`]; to be thrown away where the command is an error.
    pub payload: u32,
    /// It is a read, whose reply has a form of its own, also where it is an error.
    pub read: bool,
    /// The reply to a read may not come in pieces.
    pub whole: bool,
}

impl Request {
    /// Parses a header for a disk of `disk_bytes`.
    ///
    /// # Errors
    /// [`ProtocolError::Magic`]; [`ProtocolError::TooLong`] for a write whose payload is not worth skipping: close the
    /// connection.
    pub fn parse(bytes: &[u8; REQUEST_BYTES], disk_bytes: u64, structured: bool) -> Result<Self, ProtocolError> {
        let found = be_u32(&bytes[..4]);
        if found != REQUEST_MAGIC {
            let (expected, found) = (u64::from(REQUEST_MAGIC), u64::from(found));
            return Err(ProtocolError::Magic { what: "a request", expected, found });
        }
        let flags = u16::from_be_bytes([bytes[4], bytes[5]]);
        let kind = u16::from_be_bytes([bytes[6], bytes[7]]);
        let (cookie, offset, length) = (be_u64(&bytes[8..16]), be_u64(&bytes[16..24]), be_u32(&bytes[24..]));
        let payload = if kind == 1 { length } else { 0 };
        if payload > PAYLOAD_BYTES_MAX {
            let (found, limit) = (u64::from(payload), u64::from(PAYLOAD_BYTES_MAX));
            return Err(ProtocolError::TooLong { what: "a write", found, limit });
        }
        let fua = flags & COMMAND_FLAG_FUA != 0;
        let allowed = match kind {
            0 if structured => COMMAND_FLAG_FUA | COMMAND_FLAG_DF,
            6 => COMMAND_FLAG_FUA | COMMAND_FLAG_NO_HOLE,
            _ => COMMAND_FLAG_FUA,
        };
        let within = offset.checked_add(u64::from(length)).is_some_and(|end| end <= disk_bytes);
        let command = match kind {
            2 => Ok(Command::Disconnect),
            _ if flags & !allowed != 0 => Err(Errno::Invalid),
            3 => Ok(Command::Flush),
            0 | 1 | 4 | 6 if length == 0 => Err(Errno::Invalid),
            0 | 4 if !within => Err(Errno::Invalid),
            1 | 6 if !within => Err(Errno::NoSpace),
            0 if length > PAYLOAD_BYTES_MAX => Err(Errno::Invalid),
            0 => Ok(Command::Read { offset, length }),
            1 => Ok(Command::Write { offset, length, fua }),
            4 => Ok(Command::Trim { offset, length, fua }),
            6 => Ok(Command::WriteZeroes { offset, length, fua, may_punch: flags & COMMAND_FLAG_NO_HOLE == 0 }),
            _ => Err(Errno::Invalid),
        };
        Ok(Self { cookie, command, payload, read: kind == 0, whole: flags & COMMAND_FLAG_DF != 0 })
    }
}

/// The reply to anything but a successful read with structured replies.
#[must_use]
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The head of a chunk with `length` bytes of the disk from `offset` on, which follow it. `last`: no chunk comes after it.
#[must_use]
pub fn data_chunk(cookie: u64, offset: u64, length: u32, last: bool) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..20].copy_from_slice(&chunk_head(cookie, 1, last, length.saturating_add(8)));
    bytes[20..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// The last chunk of a read that failed.
#[must_use]
pub fn error_chunk(cookie: u64, error: Errno) -> [u8; 26] {
    let mut bytes = [0; 26];
    bytes[..20].copy_from_slice(&chunk_head(cookie, (1 << 15) + 1, true, 6));
    bytes[20..24].copy_from_slice(&(error as u32).to_be_bytes());
    bytes
}

fn chunk_head(cookie: u64, kind: u16, last: bool, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&u16::from(last).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}
