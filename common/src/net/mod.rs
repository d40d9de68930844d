//! The network rim: QUIC and TCP endpoints, TLS identity, the control protocol's generated types.
//!
//! One port number carries both protocols: QUIC on UDP for data, gRPC over TLS on TCP for control. Both are TLS 1.3 with
//! ring's provider, and both ends are known by certificates of the fleet's own authority ([`identity`]). QUIC is never
//! answered without one; of the control calls `Register` alone is ([`grpc`]).
//!
//! This module reads no wall clock of its own (certificates are checked against the machine's clock by rustls) and keeps
//! no secret in a type that prints.

pub mod backoff;
pub mod enrolment;
pub mod grpc;
pub mod identity;
pub mod operator;
pub mod passphrase;
pub mod quic;
pub mod register;
pub mod resolve;
pub mod secret_file;
pub mod tls;
pub mod version;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

/// The control protocol (`proto/blockferry/v1/control.proto`), generated.
#[expect(missing_docs, reason = "generated; the .proto file documents it")]
#[allow(clippy::all, reason = "generated")]
pub mod pb {
    tonic::include_proto!("blockferry.v1");

    impl std::fmt::Debug for RegisterRequest {
        /// Without the secret.
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("RegisterRequest").field("machine_name", &self.machine_name).finish_non_exhaustive()
        }
    }
}
