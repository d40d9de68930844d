//! Divides the memory for unread bytes among the connections that there are: QUIC's windows bound each connection, and it is
//! their sum that the memory budget is about.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{Connection, VarInt};

/// Largest window of a connection: what a path of 1 GB/s and 8 ms holds.
const WINDOW_BYTES_MAX: u64 = 8 << 20;
/// Smallest: a connection has to move on.
const WINDOW_BYTES_MIN: u64 = 32 << 10;

/// The window of each of `connections` connections that together may hold `total` unread bytes. Something is left for one
/// more, which holds its window before it is counted.
#[must_use]
pub fn window_of(total: u64, connections: usize) -> u32 {
    let window = (total / (connections as u64 + 1)).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
    u32::try_from(window).unwrap_or(u32::MAX)
}

/// All connections, each with the same window.
#[derive(Debug)]
pub(super) struct Windows {
    total: u64,
    open: Mutex<HashMap<usize, Connection>>,
}

impl Windows {
    pub(super) fn new(total: u64) -> Self {
        Self { total, open: Mutex::default() }
    }

    /// Counts a connection until what is returned is dropped, and divides anew.
    pub(super) fn enter(self: &Arc<Self>, connection: &Connection) -> Window {
        let id = connection.stable_id();
        self.change(|open| drop(open.insert(id, connection.clone())));
        Window { windows: Arc::clone(self), id }
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<usize, Connection>)) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut open);
        let window = VarInt::from_u32(window_of(self.total, open.len()));
        // What a peer was allowed before it may still send; from then on it gets less.
        for connection in open.values() {
            connection.set_receive_window(window);
        }
    }
}

/// A connection's part, given back when dropped.
pub(super) struct Window {
    windows: Arc<Windows>,
    id: usize,
}

impl Drop for Window {
    fn drop(&mut self) {
        self.windows.change(|open| drop(open.remove(&self.id)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_all_connections_together_stay_within_the_memory_for_them() {
        for connections in 1..=200 {
            let window = u64::from(window_of(8 << 20, connections));
            assert!(window * (connections as u64) < 8 << 20 || window == WINDOW_BYTES_MIN, "{connections}: {window}");
        }
        assert_eq!(window_of(1 << 30, 1), 8 << 20, "more than a path holds is of no use");
    }
}
