//! `blockferry volume list`, and the plain tables of this tool.

use std::io::Write;

use catalog::store::Store;
use catalog::volume::lifecycle::{self, Known};
use common::format::lifecycle::Phase;
use common::units::ByteCount;

use crate::error::OperatorError;
use crate::lifecycle::ChangeError;

/// One volume, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VolumeRow {
    /// Its id.
    pub id: String,
    /// Machine's name.
    pub machine: String,
    /// Its name.
    pub volume: String,
    /// Size of its disk in bytes.
    pub bytes: u64,
    /// Incarnation of the disk.
    pub incarnation: u32,
    /// When it was registered, RFC 3339 in UTC.
    pub created: String,
    /// `active`, `retired` or `deleted`.
    pub state: &'static str,
}

/// Lists volumes by machine and name, with `all` those that are deleted too. One that can't be read is an error, after the others were
/// listed.
///
/// # Errors
/// [`OperatorError`].
pub async fn list(store: &Store, all: bool, json: bool, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let (known, mut errors) = lifecycle::list(store).await.map_err(ChangeError::from)?;
    let rows: Vec<VolumeRow> = known
        .iter()
        .filter(|known| all || known.phase != Phase::Deleted)
        .map(|Known { header, phase, .. }| VolumeRow {
            id: header.volume.to_string(),
            machine: header.machine_name.clone(),
            volume: header.name.clone(),
            bytes: header.current().disk_bytes,
            incarnation: header.current().incarnation.0,
            created: header.created.to_string(),
            state: phase.as_str(),
        })
        .collect();
    print(&rows, json, out).map_err(OperatorError::Output)?;
    if errors.is_empty() { Ok(()) } else { Err(ChangeError::from(errors.swap_remove(0)).into()) }
}

fn print(rows: &[VolumeRow], json: bool, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, rows)?;
        return writeln!(out);
    }
    let mut table = Table::new(&["MACHINE", "VOLUME", "SIZE", "CREATED", "STATE", "ID"]);
    for row in rows {
        let size = ByteCount(row.bytes).to_string();
        table.row(vec![
            row.machine.clone(),
            row.volume.clone(),
            size,
            row.created.clone(),
            row.state.to_owned(),
            row.id.clone(),
        ]);
    }
    table.print(out)
}

/// Columns of text, each as wide as its widest cell.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()] }
    }

    /// Adds a row of as many cells as there are headings.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of writing.
    pub fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_no_line_ends_in_blanks() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(vec!["wider".into(), "x".into()]);
        let mut out = Vec::new();
        table.print(&mut out).expect("memory");
        assert_eq!(String::from_utf8(out).expect("text"), "A      LONG\nwider  x\n");
    }
}
