//! Judges a restored image by the log of writes.
//!
//! For each sector the image shows one write (or what was there before). A point is *at or after* every write that it shows
//! anything of. So with T the latest submission among the writes shown, every write that completed before T has to be in the
//! point: each of its sectors shows it, or a write that is not known to have completed before it was submitted. A point asked
//! for at a known moment is after that moment too (`floor`), and holds nothing submitted after it was there (`ceiling`).
//!
//! Before the first write every sector is stamped as write 0. Sectors that show zeros may be any zeroing's: the most favourable
//! one is taken.

use std::fmt;
use std::io::Read;

use super::history::{Kind, Log, Moment, NEVER, Write};
use super::stamp::{Content, PAGE_SECTORS, SECTOR, read};

/// What is known of when a point was cut.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// It was asked for after this moment.
    pub floor: Moment,
    /// It was there before this moment.
    pub ceiling: Moment,
}

impl Window {
    /// Nothing is known.
    pub const ANY: Self = Self { floor: 0, ceiling: NEVER };
}

/// What a point showed.
#[derive(Debug, Clone)]
pub struct Shown {
    /// The write of each sector; `None` for zeros.
    pub sectors: Vec<Option<u64>>,
    /// Everything that completed before this moment is in it.
    pub at_least: Moment,
}

/// Why a point is not what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The sector where it shows.
    pub sector: u64,
    /// What is wrong, with the numbers of the writes.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}, sector {}: {}", self.sector / PAGE_SECTORS, self.sector, self.what)
    }
}

/// A finished log, by sector.
#[derive(Debug)]
pub struct Oracle<'a> {
    log: &'a Log,
    /// Numbers of the writes to each sector, ascending.
    by_sector: Vec<Vec<u32>>,
}

impl<'a> Oracle<'a> {
    /// Of a disk of `sectors` sectors.
    ///
    /// # Panics
    /// If a write lies beyond its end.
    #[must_use]
    pub fn new(log: &'a Log, sectors: u64) -> Self {
        let mut by_sector = vec![Vec::new(); usize::try_from(sectors).expect("in memory")];
        for (at, write) in log.writes.iter().enumerate() {
            let number = u32::try_from(at + 1).expect("a test makes fewer writes");
            for sector in write.sectors.clone() {
                by_sector[usize::try_from(sector).expect("in memory")].push(number);
            }
        }
        Self { log, by_sector }
    }

    fn write(&self, number: u64) -> Option<&Write> {
        self.log.writes.get(usize::try_from(number.checked_sub(1)?).ok()?)
    }

    /// Judges an image. `previous` is an earlier point of the same disk.
    ///
    /// # Errors
    /// The first [`Violation`].
    ///
    /// # Panics
    /// If the image is shorter than the disk.
    pub fn judge(&self, image: &mut dyn Read, window: Window, previous: Option<&Shown>) -> Result<Shown, Violation> {
        let sectors = self.read_sectors(image, window)?;
        let submitted = |number: &u64| self.write(*number).map(|write| write.submitted);
        let latest = sectors.iter().flatten().filter_map(submitted).max().unwrap_or(0);
        let earlier = previous.map_or(0, |point| point.at_least);
        let at_least = latest.max(window.floor).max(earlier);
        for (at, shown) in sectors.iter().enumerate() {
            if shown.is_none() && self.zeroings(at, window.ceiling).next().is_none() {
                return Err(Violation { sector: at as u64, what: "shows zeros, and nobody made it zero".to_owned() });
            }
            self.judge_sector(at, *shown, at_least, window.ceiling)?;
            let before =
                previous.and_then(|point| point.sectors[at]).and_then(|number| Some((number, submitted(&number)?)));
            if let Some((number, before)) = before
                && self.newest(at, *shown, window.ceiling) < before
            {
                let what = format!("shows {}, an earlier point showed write {number}", name(*shown));
                return Err(Violation { sector: at as u64, what });
            }
        }
        Ok(Shown { sectors, at_least })
    }

    /// What each sector shows, all of it written by somebody.
    fn read_sectors(&self, image: &mut dyn Read, window: Window) -> Result<Vec<Option<u64>>, Violation> {
        let mut sectors = Vec::with_capacity(self.by_sector.len());
        let mut chunk = vec![0; 1 << 20];
        while sectors.len() < self.by_sector.len() {
            let count = (self.by_sector.len() - sectors.len()).min(chunk.len() / SECTOR);
            image.read_exact(&mut chunk[..count * SECTOR]).expect("the image is as long as the disk");
            for bytes in chunk[..count * SECTOR].chunks(SECTOR) {
                let sector = sectors.len() as u64;
                let violation = |what: String| Err(Violation { sector, what });
                let shown = match read(bytes, sector) {
                    Content::Zero => None,
                    Content::Foreign => return violation("holds what nobody wrote there".to_owned()),
                    Content::Write { number, awaited } => match self.write(number) {
                        None if number == 0 => Some(0),
                        Some(write)
                            if write.kind == Kind::Stamp
                                && write.awaited == awaited
                                && write.sectors.contains(&sector) =>
                        {
                            if write.submitted > window.ceiling {
                                let what = format!("shows write {number}, submitted after the point was there");
                                return violation(what);
                            }
                            Some(number)
                        }
                        _ => return violation(format!("shows write {number}, which was never made there")),
                    },
                };
                sectors.push(shown);
            }
        }
        Ok(sectors)
    }

    /// When what a sector shows was complete, at the latest: that of the most favourable write where it shows zeros.
    fn newest(&self, at: usize, shown: Option<u64>, ceiling: Moment) -> Moment {
        match shown {
            Some(number) => self.write(number).map_or(0, |write| write.completed),
            None => self.zeroings(at, ceiling).map(|write| write.completed).max().unwrap_or(0),
        }
    }

    /// Writes that may have made a sector zero.
    fn zeroings(&self, at: usize, ceiling: Moment) -> impl Iterator<Item = &Write> {
        let writes = self.by_sector[at].iter().filter_map(|number| self.write(u64::from(*number)));
        writes.filter(move |write| write.kind != Kind::Stamp && write.submitted <= ceiling)
    }

    /// No write that has to be in the point is missing from this sector.
    fn judge_sector(&self, at: usize, shown: Option<u64>, at_least: Moment, ceiling: Moment) -> Result<(), Violation> {
        let newest = self.newest(at, shown, ceiling);
        let writes = &self.by_sector[at];
        let of = |number: &u32| self.write(u64::from(*number)).expect("it is in the log");
        let first = writes.partition_point(|number| of(number).submitted <= newest);
        // Numbers and submissions ascend together; nothing completes before it is submitted.
        for number in writes[first..].iter().take_while(|number| of(number).submitted < at_least) {
            let write = of(number);
            let missing = write.kind != Kind::Trim && write.completed < at_least && write.submitted <= ceiling;
            if missing && shown != Some(u64::from(*number)) {
                let what = format!(
                    "shows {}, but write {number} (submitted {}, completed {}) came after it and completed before {at_least}, \
                     and something of that moment is in the point",
                    name(shown),
                    write.submitted,
                    write.completed
                );
                return Err(Violation { sector: at as u64, what });
            }
        }
        Ok(())
    }
}

fn name(shown: Option<u64>) -> String {
    match shown {
        None => "zeros".to_owned(),
        Some(0) => "what was there before".to_owned(),
        Some(number) => format!("write {number}"),
    }
}

#[cfg(test)]
mod tests;
