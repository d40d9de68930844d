//! The store in S3, Azure Blob Storage or Google Cloud Storage, through `object_store`.
//!
//! Endpoints, credentials and proxies come from the environment as `object_store`'s builders read it. Where the
//! environment holds no credentials at all the opening fails at once and names the variables, instead of asking an
//! instance metadata service that isn't there; a machine whose role gives the credentials sets the endpoint of that
//! service, which is among the names.
//!
//! Bodies above [`PART_BYTES`] go up as multipart, parts in parallel. A multipart upload that this process could not
//! finish is aborted; one that a kill left behind is invisible to readers and costs space until the bucket's own rule for
//! incomplete uploads removes it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::clock::UnixMillis;
use futures::StreamExt as _;
use futures::stream::{BoxStream, FuturesUnordered};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as Aws};
use object_store::azure::{AzureConfigKey as Azure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey as Google};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    BackoffConfig, Certificate, ClientConfigKey, ClientOptions, Error, ObjectStore, ObjectStoreExt as _, PutMode,
    PutOptions, PutPayload, PutResult, RetryConfig, UpdateVersion,
};

use super::{CasOutcome, GET_BYTES_MAX, ObjectMeta, PutOutcome, StoreError, StoreOptions, Version, VersionKind, path};

/// Size of a multipart part: above every store's minimum (5 MiB), and small enough that a repeated part costs little.
const PART_BYTES: usize = 8 << 20;
/// Parts of one object under way at once.
const PARTS_IN_FLIGHT_MAX: usize = 4;
/// Longest request, unless the environment says otherwise: a part at 70 KiB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// Retries do not renew credentials, so their window stays under five minutes.
const RETRY_WINDOW: Duration = Duration::from_secs(3 * 60);
/// Retries of one request.
const RETRIES_MAX: usize = 8;
/// How much of a store's own words goes into an error.
const REASON_CHARS_MAX: usize = 400;

const AWS_VARIABLES: &str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN, \
     or AWS_CONTAINER_CREDENTIALS_RELATIVE_URI; on an instance with a role AWS_METADATA_ENDPOINT=http://169.254.169.254";
const AZURE_ACCOUNT_VARIABLES: &str = "AZURE_STORAGE_ACCOUNT_NAME";
const AZURE_VARIABLES: &str = "AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY, or AZURE_STORAGE_CLIENT_ID with \
     AZURE_STORAGE_CLIENT_SECRET and AZURE_STORAGE_TENANT_ID, or AZURE_FEDERATED_TOKEN_FILE; on an instance with an \
     identity AZURE_MSI_ENDPOINT";
const GOOGLE_VARIABLES: &str = "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS (a key file's path), or \
     GOOGLE_SERVICE_ACCOUNT_KEY; on an instance with a service account GCE_METADATA_HOST=169.254.169.254";

/// A cloud store; clones share its connections.
#[derive(Debug, Clone)]
pub(super) struct CloudStore {
    store: Arc<dyn ObjectStore>,
}

impl CloudStore {
    pub(super) fn open(url: &str, parsed: &url::Url, options: StoreOptions) -> Result<Self, StoreError> {
        let bad = |why: String| StoreError::Url { url: url.into(), why };
        let name = parsed.host_str().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| bad("expected a bucket or container name after ://".into()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() || parsed.port().is_some() {
            return Err(bad("expected bucket and prefix alone; endpoints come from the environment".into()));
        }
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(bad("credentials belong into the environment, not into the URL".into()));
        }
        let prefix = parsed.path().trim_matches('/');
        if !prefix.is_empty() {
            path::check(prefix).map_err(|error| bad(error.to_string()))?;
        }
        // The HTTP client takes the process's TLS provider; main has installed it already, a test may not have.
        common::net::tls::install_provider();
        let scheme = parsed.scheme();
        let client = client_options(url, scheme, options)?;
        let built: Result<Arc<dyn ObjectStore>, Error> = match scheme {
            "s3" => {
                let builder = AmazonS3Builder::from_env();
                check_aws(url, &builder)?;
                let builder = builder.with_bucket_name(name).with_client_options(client).with_retry(retry());
                builder.build().map(|store| Arc::new(store) as _)
            }
            "az" => {
                let builder = MicrosoftAzureBuilder::from_env();
                check_azure(url, &builder)?;
                let builder = builder.with_container_name(name).with_client_options(client).with_retry(retry());
                builder.build().map(|store| Arc::new(store) as _)
            }
            _ => {
                let builder = GoogleCloudStorageBuilder::from_env();
                check_google(url, &builder, |name| std::env::var_os(name).is_some())?;
                let builder = builder.with_bucket_name(name).with_client_options(client).with_retry(retry());
                builder.build().map(|store| Arc::new(store) as _)
            }
        };
        let store = built.map_err(|error| bad(reason(&error)))?;
        let store = if prefix.is_empty() { store } else { Arc::new(PrefixStore::new(store, Path::from(prefix))) };
        Ok(Self { store })
    }

    pub(super) async fn get_versioned(&self, path: &str) -> Result<(Bytes, Version), StoreError> {
        let found = self.store.get(&Path::from(path)).await.map_err(|error| failed("read", path, error))?;
        if found.meta.size > GET_BYTES_MAX {
            return Err(StoreError::TooLarge { path: path.into(), found: found.meta.size, max: GET_BYTES_MAX });
        }
        let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
        let body = found.bytes().await.map_err(|error| failed("read", path, error))?;
        Ok((body, Version(VersionKind::Cloud(version))))
    }

    pub(super) async fn get_range(&self, path: &str, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        let end = range.end;
        match self.store.get_range(&Path::from(path), range.clone()).await {
            Ok(body) if body.len() as u64 == end - range.start => Ok(body),
            Ok(body) => {
                Err(StoreError::Truncated { path: path.into(), expected: end, found: range.start + body.len() as u64 })
            }
            // Stores answer a range beyond the end in different ways; the size tells.
            Err(error @ Error::Generic { .. }) => match self.size(path).await {
                Ok(size) if size < end => Err(StoreError::Truncated { path: path.into(), expected: end, found: size }),
                _ => Err(failed("read", path, error)),
            },
            Err(error) => Err(failed("read", path, error)),
        }
    }

    pub(super) async fn size(&self, path: &str) -> Result<u64, StoreError> {
        self.store.head(&Path::from(path)).await.map(|meta| meta.size).map_err(|error| failed("look up", path, error))
    }

    pub(super) async fn put(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let at = Path::from(path);
        if parts.iter().map(Bytes::len).sum::<usize>() <= PART_BYTES {
            let payload = PutPayload::from_iter(parts);
            return self.store.put(&at, payload).await.map(drop).map_err(|error| failed("write", path, error));
        }
        let mut upload = self.store.put_multipart(&at).await.map_err(|error| failed("write", path, error))?;
        let mut flying = FuturesUnordered::new();
        let mut result = Ok(());
        for payload in cut(parts, PART_BYTES) {
            if flying.len() >= PARTS_IN_FLIGHT_MAX
                && let Some(done) = flying.next().await
            {
                result = done;
                if result.is_err() {
                    break;
                }
            }
            flying.push(upload.put_part(payload));
        }
        while let (Ok(()), Some(done)) = (&result, flying.next().await) {
            result = done;
        }
        drop(flying);
        let result = match result {
            Ok(()) => upload.complete().await.map(drop),
            Err(error) => Err(error),
        };
        if result.is_err() {
            // The upload's parts go; where that fails too, the bucket's rule for incomplete uploads takes them.
            let _ = upload.abort().await;
        }
        result.map_err(|error| failed("write", path, error))
    }

    pub(super) async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<PutOutcome, StoreError> {
        match self.put_with(path, body, PutMode::Create).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(PutOutcome::Exists),
            Err(error) => Err(failed("create", path, error)),
        }
    }

    pub(super) async fn compare_and_swap(
        &self,
        path: &str,
        version: UpdateVersion,
        body: Bytes,
    ) -> Result<CasOutcome, StoreError> {
        match self.put_with(path, body, PutMode::Update(version)).await {
            Ok(put) => Ok(CasOutcome::Swapped(Version(VersionKind::Cloud(UpdateVersion {
                e_tag: put.e_tag,
                version: put.version,
            })))),
            Err(Error::Precondition { .. } | Error::NotFound { .. }) => Ok(CasOutcome::Changed),
            Err(error) => Err(failed("replace", path, error)),
        }
    }

    pub(super) fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        let folder = prefix.to_owned();
        self.store
            .list(Some(&Path::from(prefix)))
            .map(move |item| match item {
                Ok(meta) => Ok(ObjectMeta {
                    path: meta.location.to_string(),
                    size: meta.size,
                    modified: UnixMillis(meta.last_modified.timestamp_millis()),
                }),
                Err(error) => Err(failed("list", &folder, error)),
            })
            .boxed()
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        match self.store.delete(&Path::from(path)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("delete", path, error)),
        }
    }

    async fn put_with(&self, path: &str, body: Bytes, mode: PutMode) -> Result<PutResult, Error> {
        let options = PutOptions { mode, ..PutOptions::default() };
        self.store.put_opts(&Path::from(path), body.into(), options).await
    }
}

/// Payloads of exactly `size` bytes (the last one shorter) that share the memory of `parts`.
fn cut(parts: Vec<Bytes>, size: usize) -> Vec<PutPayload> {
    let mut payloads = Vec::new();
    let (mut open, mut len) = (Vec::new(), 0);
    for mut part in parts {
        while !part.is_empty() {
            let piece = part.split_to(part.len().min(size - len));
            len += piece.len();
            open.push(piece);
            if len == size {
                payloads.push(PutPayload::from_iter(std::mem::take(&mut open)));
                len = 0;
            }
        }
    }
    if !open.is_empty() {
        payloads.push(PutPayload::from_iter(open));
    }
    payloads
}

fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(15),
            base: 2.0,
        },
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_WINDOW,
    }
}

/// The HTTP client's options: our defaults, then what the environment says, then the further authorities.
fn client_options(url: &str, scheme: &str, options: StoreOptions) -> Result<ClientOptions, StoreError> {
    let variables = match scheme {
        "s3" => "aws_",
        "az" => "azure_",
        _ => "google_",
    };
    let mut client = ClientOptions::new().with_timeout(REQUEST_TIMEOUT);
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
            && let Some(key) = name.to_ascii_lowercase().strip_prefix(variables)
            && let Ok(key) = key.parse::<ClientConfigKey>()
        {
            client = client.with_config(key, value);
        }
    }
    if let Some(pem) = options.ca_pem {
        let bad = |why: String| StoreError::Url { url: url.into(), why };
        let authorities = Certificate::from_pem_bundle(&pem)
            .map_err(|error| bad(format!("the store's CA file is not PEM: {}", reason(&error))))?;
        if authorities.is_empty() {
            return Err(bad("the store's CA file holds no certificate".into()));
        }
        client = authorities.into_iter().fold(client, ClientOptions::with_root_certificate);
    }
    Ok(client)
}

fn check_aws(url: &str, builder: &AmazonS3Builder) -> Result<(), StoreError> {
    let set = |key| builder.get_config_value(&key).is_some_and(|value| !value.is_empty());
    let credentials = set(Aws::AccessKeyId)
        || set(Aws::SecretAccessKey)
        || set(Aws::WebIdentityTokenFile)
        || set(Aws::ContainerCredentialsRelativeUri)
        || set(Aws::ContainerCredentialsFullUri)
        || set(Aws::MetadataEndpoint)
        || is_true(builder.get_config_value(&Aws::SkipSignature));
    require(url, credentials, AWS_VARIABLES)
}

fn check_azure(url: &str, builder: &MicrosoftAzureBuilder) -> Result<(), StoreError> {
    let set = |key| builder.get_config_value(&key).is_some_and(|value| !value.is_empty());
    if is_true(builder.get_config_value(&Azure::UseEmulator)) {
        return Ok(());
    }
    require(url, set(Azure::AccountName), AZURE_ACCOUNT_VARIABLES)?;
    let credentials = set(Azure::AccessKey)
        || set(Azure::SasKey)
        || set(Azure::Token)
        || set(Azure::ClientSecret)
        || set(Azure::FederatedTokenFile)
        || set(Azure::MsiEndpoint)
        || set(Azure::FabricTokenServiceUrl)
        || is_true(builder.get_config_value(&Azure::UseAzureCli))
        || is_true(builder.get_config_value(&Azure::SkipSignature));
    require(url, credentials, AZURE_VARIABLES)
}

fn check_google(
    url: &str,
    builder: &GoogleCloudStorageBuilder,
    in_environment: impl Fn(&str) -> bool,
) -> Result<(), StoreError> {
    let set = |key| builder.get_config_value(&key).is_some_and(|value| !value.is_empty());
    let credentials = set(Google::ServiceAccount)
        || set(Google::ServiceAccountKey)
        || set(Google::ApplicationCredentials)
        || set(Google::BearerToken)
        || is_true(builder.get_config_value(&Google::SkipSignature))
        || in_environment("GCE_METADATA_HOST")
        || in_environment("METADATA_HOST");
    require(url, credentials, GOOGLE_VARIABLES)
}

fn require(url: &str, present: bool, variables: &'static str) -> Result<(), StoreError> {
    if present { Ok(()) } else { Err(StoreError::NoCredentials { url: url.into(), variables }) }
}

fn is_true(value: Option<String>) -> bool {
    value.is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "on" | "yes" | "y"))
}

fn failed(op: &'static str, path: &str, error: Error) -> StoreError {
    match error {
        Error::NotFound { .. } => StoreError::NotFound { path: path.into() },
        error @ (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) => {
            StoreError::Denied { op, path: path.into(), reason: reason(&error) }
        }
        Error::NotSupported { .. } | Error::NotImplemented { .. } => {
            StoreError::NotConditional { what: "the operations that Blockferry needs" }
        }
        error => StoreError::Unavailable { op, path: path.into(), reason: reason(&error) },
    }
}

/// An error's own words, of bounded length and on one line.
fn reason(error: &Error) -> String {
    error.to_string().chars().take(REASON_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_without_credentials_is_an_error_that_names_the_variables() {
        let error = check_aws("s3://b", &AmazonS3Builder::new()).expect_err("no credentials");
        assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
        let error = check_azure("az://c", &MicrosoftAzureBuilder::new()).expect_err("no account");
        assert!(error.to_string().contains("AZURE_STORAGE_ACCOUNT_NAME"), "{error}");
        let error = check_azure("az://c", &MicrosoftAzureBuilder::new().with_account("a")).expect_err("no key");
        assert!(error.to_string().contains("AZURE_STORAGE_ACCOUNT_KEY"), "{error}");
        let error = check_google("gs://b", &GoogleCloudStorageBuilder::new(), |_| false).expect_err("no credentials");
        assert!(error.to_string().contains("GOOGLE_SERVICE_ACCOUNT"), "{error}");
    }

    #[test]
    fn any_kind_of_credentials_is_taken() {
        assert!(check_aws("s3://b", &AmazonS3Builder::new().with_access_key_id("k")).is_ok());
        assert!(check_aws("s3://b", &AmazonS3Builder::new().with_skip_signature(true)).is_ok());
        assert!(check_azure("az://c", &MicrosoftAzureBuilder::new().with_use_emulator(true)).is_ok());
        assert!(check_google("gs://b", &GoogleCloudStorageBuilder::new(), |name| name == "GCE_METADATA_HOST").is_ok());
    }

    #[test]
    fn the_named_variables_are_those_that_the_builders_read() {
        for key in ["aws_access_key_id", "aws_secret_access_key", "aws_web_identity_token_file", "aws_role_arn"] {
            assert!(key.parse::<Aws>().is_ok(), "{key}");
        }
        for key in ["aws_container_credentials_relative_uri", "aws_metadata_endpoint"] {
            assert!(key.parse::<Aws>().is_ok(), "{key}");
        }
        for key in ["account_name", "account_key", "sas_key", "client_id", "client_secret", "tenant_id"] {
            assert!(format!("azure_storage_{key}").parse::<Azure>().is_ok(), "{key}");
        }
        for key in ["azure_federated_token_file", "azure_msi_endpoint"] {
            assert!(key.parse::<Azure>().is_ok(), "{key}");
        }
        for key in ["google_service_account", "google_application_credentials", "google_service_account_key"] {
            assert!(key.parse::<Google>().is_ok(), "{key}");
        }
    }

    #[test]
    fn multipart_pieces_are_equal_but_the_last_and_hold_all_bytes_in_order() {
        let parts = vec![Bytes::from(vec![1; 7]), Bytes::new(), Bytes::from(vec![2; 20]), Bytes::from(vec![3; 3])];
        let whole = parts.concat();
        let cut = cut(parts, 8);
        assert_eq!(cut.iter().map(PutPayload::content_length).collect::<Vec<_>>(), vec![8, 8, 8, 6]);
        assert_eq!(cut.iter().flat_map(|piece| piece.iter().flatten().copied()).collect::<Vec<_>>(), whole);
    }
}
