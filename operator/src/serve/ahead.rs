//! Which reads follow one another, and how far ahead of them to fetch. PURE.
//!
//! A client may read in order over several connections at once, so a stream of reads is known by where it is on the disk, not by who
//! reads: a request that begins near where a stream has come to goes on with it.

use std::ops::Range;

/// Streams told apart; the one that was quiet for longest makes room for another.
const STREAMS: usize = 8;
/// How far from a stream's end a request may begin to belong to it.
const SLACK_BYTES: u64 = 4 << 20;
/// Requests of a stream before anything is fetched ahead.
const REQUESTS_MIN: u32 = 2;
/// First and largest distance fetched ahead.
const AHEAD_BYTES: Range<u64> = 1 << 20..16 << 20;

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Behind the last byte asked for.
    end: u64,
    /// Behind the last byte fetched ahead.
    ahead: u64,
    requests: u32,
    distance: u64,
}

/// What was read lately.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// The one used last at the end.
    streams: Vec<Stream>,
}

impl ReadAhead {
    /// Notes a read; returns what to fetch ahead of it, if anything.
    pub(super) fn note(&mut self, read: Range<u64>, disk_bytes: u64) -> Option<Range<u64>> {
        let near = |stream: &Stream| {
            read.start <= stream.end.saturating_add(SLACK_BYTES) && read.end.saturating_add(SLACK_BYTES) >= stream.end
        };
        let Some(at) = self.streams.iter().position(near) else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream { end: read.end, ahead: read.end, requests: 1, distance: AHEAD_BYTES.start });
            return None;
        };
        let mut stream = self.streams.remove(at);
        let forward = read.end > stream.end;
        // Reads around one place are no stream that goes anywhere.
        stream.requests = if forward { stream.requests.saturating_add(1) } else { stream.requests };
        stream.end = stream.end.max(read.end);
        let mut fetch = None;
        if forward && stream.requests > REQUESTS_MIN && stream.end + stream.distance / 2 > stream.ahead {
            let start = stream.ahead.max(stream.end);
            let end = (stream.end + stream.distance).min(disk_bytes);
            stream.distance = (stream.distance * 2).min(AHEAD_BYTES.end);
            if start < end {
                stream.ahead = end;
                fetch = Some(start..end);
            }
        }
        self.streams.push(stream);
        fetch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 1 << 30;
    const PIECE: u64 = 256 << 10;

    #[test]
    fn reads_in_order_are_fetched_ahead_of_each_byte_once_and_further_each_time() {
        let mut ahead = ReadAhead::default();
        let mut fetched: Vec<Range<u64>> = Vec::new();
        for piece in 0..DISK / PIECE {
            let start = piece * PIECE;
            fetched.extend(ahead.note(start..start + PIECE, DISK));
        }
        assert_eq!(fetched.first(), Some(&(3 * PIECE..3 * PIECE + (1 << 20))));
        assert!(fetched.is_sorted_by(|a, b| a.end <= b.start), "nothing twice: {fetched:?}");
        assert_eq!(fetched.last().map(|range| range.end), Some(DISK));
        assert!(fetched.iter().all(|range| range.end - range.start <= AHEAD_BYTES.end));
    }

    #[test]
    fn reads_of_one_stream_that_come_out_of_order_are_one_and_scattered_ones_are_none() {
        let mut ahead = ReadAhead::default();
        let order = [0, 2, 1, 3, 5, 4, 7, 6];
        let fetched = order.iter().filter_map(|at| ahead.note(at * PIECE..(at + 1) * PIECE, DISK)).count();
        assert!(fetched > 0);
        let mut ahead = ReadAhead::default();
        for turn in 0..1000_u64 {
            let at = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK / 4096) * 4096;
            // Two that happen to lie close are forgiven, a storm of fetching ahead is not.
            if let Some(range) = ahead.note(at..at + 4096, DISK) {
                assert!(range.end - range.start <= 4 << 20, "{range:?}");
            }
        }
    }
}
