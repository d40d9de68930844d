//! Whether a close says the truth about what is staged: everything that can be checked without a data key. Pure.

use common::error::{Dispose, Disposition};
use common::format::close::Close;
use common::format::record::RecordMeta;
use common::format::volume_header::VolumeHeader;
use common::ids::{Digest, Epoch, Incarnation};
use common::seal::SealError;
use common::seal::merkle::{MetaTree, OrderError};
use common::seal::signing::verify_close;

/// What a close says that is not so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Not signed by the key that the volume's header pins.
    #[error(transparent)]
    Signature(#[from] SealError),
    /// Of another volume or fleet.
    #[error("close of epoch {0} is of another volume or fleet")]
    Foreign(Epoch),
    /// Of a disk that the volume's header does not have.
    #[error(
        "close of epoch {epoch} states incarnation {incarnation} with {disk_bytes} bytes, which the header does not have"
    )]
    Disk {
        /// Epoch.
        epoch: Epoch,
        /// Incarnation stated.
        incarnation: Incarnation,
        /// Size stated.
        disk_bytes: u64,
    },
    /// Records of the epoch overlap.
    #[error("epoch {epoch}: {source}")]
    Overlap {
        /// Epoch.
        epoch: Epoch,
        /// Where.
        source: OrderError,
    },
    /// A count differs from what is staged.
    #[error("close of epoch {epoch} states {stated} {what}, staged are {found}")]
    Count {
        /// Epoch.
        epoch: Epoch,
        /// What is counted.
        what: &'static str,
        /// Stated.
        stated: u64,
        /// Staged.
        found: u64,
    },
    /// The Merkle root differs from that of what is staged.
    #[error("close of epoch {epoch} states metadata root {stated}, what is staged has {found}")]
    Root {
        /// Epoch.
        epoch: Epoch,
        /// Stated.
        stated: Digest,
        /// Of what is staged.
        found: Digest,
    },
}

impl Dispose for VerifyError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// Checks a close's signature and place against the volume's header, its counts and Merkle root against the metadata of
/// all records of its epoch, in block order. That it follows the newest close is the session's to check.
///
/// # Errors
/// [`VerifyError`], the first thing that does not fit.
pub fn check_close(header: &VolumeHeader, close: &Close, metas: &[RecordMeta]) -> Result<(), VerifyError> {
    let statement = close.statement();
    let epoch = statement.epoch;
    verify_close(close, &header.signing_key)?;
    if statement.volume != header.volume || statement.fleet != header.fleet {
        return Err(VerifyError::Foreign(epoch));
    }
    let size = header.incarnations.iter().find(|size| size.incarnation == statement.incarnation);
    if size.is_none_or(|size| size.disk_bytes != statement.disk_bytes) {
        let (incarnation, disk_bytes) = (statement.incarnation, statement.disk_bytes);
        return Err(VerifyError::Disk { epoch, incarnation, disk_bytes });
    }
    let mut tree = MetaTree::default();
    let (mut data_pages, mut zero_pages, mut record_bytes) = (0_u64, 0_u64, 0_u64);
    for meta in metas {
        tree.push(meta).map_err(|source| VerifyError::Overlap { epoch, source })?;
        data_pages += u64::from(meta.data_mask.count());
        zero_pages += u64::from(meta.zero_mask.count()) * u64::from(meta.block_count);
        record_bytes += u64::from(meta.record_len);
    }
    let counts = [
        ("records", statement.records, metas.len() as u64),
        ("data pages", statement.data_pages, data_pages),
        ("zero pages", statement.zero_pages, zero_pages),
        ("record bytes", statement.record_bytes, record_bytes),
    ];
    for (what, stated, found) in counts {
        if stated != found {
            return Err(VerifyError::Count { epoch, what, stated, found });
        }
    }
    let (stated, found) = (statement.meta_root, tree.finish());
    if stated != found {
        return Err(VerifyError::Root { epoch, stated, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use common::clock::UnixMillis;
    use common::format::close::CloseStatement;
    use common::format::record::{Codec, RecordKind};
    use common::format::volume_header::IncarnationSize;
    use common::ids::{
        BlockIndex, CloseId, Digest, Epoch, FleetId, GroupId, Incarnation, KeyId, MachineId, Nonce, PageMask, Salt,
        SealTag, VolumeId,
    };
    use common::seal::{DataKey, merkle};

    use super::*;

    const VOLUME: VolumeId = VolumeId([1; 16]);

    fn key() -> DataKey {
        DataKey::from_random([7; 32])
    }

    fn header() -> VolumeHeader {
        VolumeHeader {
            nonce: Nonce::ZERO,
            fleet: FleetId([2; 16]),
            volume: VOLUME,
            machine: MachineId([3; 16]),
            machine_name: "m".into(),
            name: "v".into(),
            created: UnixMillis(0),
            sector_bytes: 512,
            key_id: KeyId(1),
            signing_key: key().signer(VOLUME).public(),
            incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes: 1 << 30 }],
            wrapped_keys: Vec::new(),
        }
    }

    fn metas() -> Vec<RecordMeta> {
        let meta = |block: u8, block_count, data_mask, zero_mask| RecordMeta {
            kind: if block_count == 1 { RecordKind::Delta } else { RecordKind::ZeroRange },
            codec: Codec::Raw,
            block_count,
            block: BlockIndex(block.into()),
            data_mask,
            zero_mask,
            counter: block.into(),
            record_len: 120,
            tag: SealTag([block; 16]),
            digest: Digest([block; 32]),
        };
        vec![meta(0, 1, PageMask(0b11), PageMask(0b100)), meta(5, 10, PageMask::EMPTY, PageMask::FULL)]
    }

    fn statement() -> CloseStatement {
        CloseStatement {
            fleet: FleetId([2; 16]),
            volume: VOLUME,
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(1),
            parent: CloseId::ZERO,
            salt: Salt::ZERO,
            cut_time: UnixMillis(0),
            point: None,
            disk_bytes: 1 << 30,
            records: 2,
            data_pages: 2,
            zero_pages: 641,
            record_bytes: 240,
            meta_root: merkle::root(&metas()).expect("in order"),
            group: GroupId::NIL,
            group_point: GroupId::NIL,
        }
    }

    fn check(statement: CloseStatement, metas: &[RecordMeta]) -> Result<(), VerifyError> {
        check_close(&header(), &key().signer(VOLUME).sign(statement), metas)
    }

    #[test]
    fn a_true_close_passes_and_every_untrue_field_is_named() {
        assert_eq!(check(statement(), &metas()), Ok(()));
        let wrong = [
            (CloseStatement { fleet: FleetId::NIL, ..statement() }, "fleet"),
            (CloseStatement { incarnation: Incarnation(2), ..statement() }, "incarnation"),
            (CloseStatement { disk_bytes: 4096, ..statement() }, "4096 bytes"),
            (CloseStatement { records: 1, ..statement() }, "records"),
            (CloseStatement { data_pages: 1, ..statement() }, "data pages"),
            (CloseStatement { zero_pages: 1, ..statement() }, "zero pages"),
            (CloseStatement { record_bytes: 1, ..statement() }, "record bytes"),
            (CloseStatement { meta_root: Digest::ZERO, ..statement() }, "root"),
        ];
        for (statement, named) in wrong {
            let error = check(statement, &metas()).expect_err(named).to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_close_signed_by_another_key_is_refused() {
        let close = DataKey::from_random([8; 32]).signer(VOLUME).sign(statement());
        let error = check_close(&header(), &close, &metas()).expect_err("another key");
        assert!(matches!(error, VerifyError::Signature(_)), "{error}");
    }

    #[test]
    fn a_record_that_was_exchanged_is_found_by_the_root() {
        let mut metas = metas();
        metas[0].digest = Digest([0xee; 32]);
        assert!(matches!(check(statement(), &metas), Err(VerifyError::Root { .. })));
    }
}
