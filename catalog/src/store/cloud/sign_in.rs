//! Where a cloud store is and how to sign in to it: the environment's variables, as `object_store`'s builders name them.
//!
//! Where there are no credentials at all the opening fails at once and names the variables, instead of asking an instance
//! metadata service that isn't there; a machine whose role gives the credentials sets the endpoint of that service, which is
//! among the names.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as Aws, Checksum};
use object_store::azure::{AzureConfigKey as Azure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey as Google};
use object_store::{BackoffConfig, Certificate, ClientConfigKey, ClientOptions, RetryConfig};

use super::http::Connector;
use super::{Client, Kind, Words};
use crate::store::environment::Environment;
use crate::store::{StoreError, StoreOptions};

/// Longest request, unless the environment says otherwise: a part at 70 KiB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

const AWS_VARIABLES: &str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN, \
     or AWS_CONTAINER_CREDENTIALS_RELATIVE_URI; on an instance with a role AWS_METADATA_ENDPOINT=http://169.254.169.254";
const AZURE_ACCOUNT_VARIABLES: &str = "AZURE_STORAGE_ACCOUNT_NAME";
const AZURE_VARIABLES: &str = "AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY, or AZURE_STORAGE_CLIENT_ID with \
     AZURE_STORAGE_CLIENT_SECRET and AZURE_STORAGE_TENANT_ID, or AZURE_FEDERATED_TOKEN_FILE; on an instance with an \
     identity AZURE_MSI_ENDPOINT";
const GOOGLE_VARIABLES: &str = "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS (a key file's path), or \
     GOOGLE_SERVICE_ACCOUNT_KEY; on an instance with a service account GCE_METADATA_HOST=169.254.169.254";

/// Opens the bucket or container `name`; sends nothing.
pub(super) fn connect(url: &str, kind: Kind, name: &str, options: StoreOptions) -> Result<Arc<dyn Client>, StoreError> {
    let StoreOptions { ca_pem, requests_per_second, environment } = options;
    let environment = environment.unwrap_or_else(Environment::of_process);
    let client = client_options(url, kind, &environment, ca_pem)?;
    let connector = Connector::new(kind, requests_per_second.map(std::num::NonZeroU32::get));
    let settings = environment.settings(kind.variables());
    let built: Result<Arc<dyn Client>, object_store::Error> = match kind {
        Kind::Amazon => {
            // A checksum of its own for every body: servers that speak S3 do not all compare the signed one.
            let mut builder = AmazonS3Builder::new().with_checksum_algorithm(Checksum::CRC64NVME);
            for (name, value) in settings {
                if let Ok(key) = name.parse::<Aws>() {
                    builder = builder.with_config(key, value);
                }
            }
            check_aws(url, &builder)?;
            let builder = builder.with_bucket_name(name).with_client_options(client).with_retry(never_again());
            // One object is deleted at a time here; not every store knows the request for many.
            let builder = builder.with_disable_bulk_delete(true).with_http_connector(connector);
            builder.build().map(|store| Arc::new(store) as _)
        }
        Kind::Azure => {
            let mut builder = MicrosoftAzureBuilder::new();
            for (name, value) in settings {
                if let Ok(key) = name.parse::<Azure>() {
                    builder = builder.with_config(key, value);
                }
            }
            if let Some(endpoint) = environment.get("IDENTITY_ENDPOINT") {
                builder = builder.with_msi_endpoint(endpoint);
            }
            check_azure(url, &builder)?;
            let builder = builder.with_container_name(name).with_client_options(client).with_retry(never_again());
            builder.with_http_connector(connector).build().map(|store| Arc::new(store) as _)
        }
        Kind::Google => {
            let mut builder = GoogleCloudStorageBuilder::new();
            if let Some(path) = environment.get("SERVICE_ACCOUNT") {
                builder = builder.with_service_account_path(path);
            }
            for (name, value) in settings {
                if let Ok(key) = name.parse::<Google>() {
                    builder = builder.with_config(key, value);
                }
            }
            check_google(url, &builder, |name| environment.get(name).is_some())?;
            let builder = builder.with_bucket_name(name).with_client_options(client).with_retry(never_again());
            builder.with_http_connector(connector).build().map(|store| Arc::new(store) as _)
        }
    };
    built.map_err(|error| StoreError::Url { url: url.into(), why: Words::of(&error).reason() })
}

/// Requests are retried in one place, `retry.rs`, where each attempt signs anew.
fn never_again() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::from_secs(60) }
}

/// The HTTP client's options: our defaults, then what the environment says, then the further authorities.
fn client_options(
    url: &str,
    kind: Kind,
    environment: &Environment,
    ca_pem: Option<Vec<u8>>,
) -> Result<ClientOptions, StoreError> {
    let variables = kind.variables();
    let mut client = ClientOptions::new().with_timeout(REQUEST_TIMEOUT);
    for (name, value) in environment.settings(variables) {
        if let Some(key) = name.get(variables.len()..)
            && let Ok(key) = key.parse::<ClientConfigKey>()
        {
            client = client.with_config(key, value);
        }
    }
    if let Some(pem) = ca_pem {
        let bad = |why: String| StoreError::Url { url: url.into(), why };
        let authorities = Certificate::from_pem_bundle(&pem)
            .map_err(|error| bad(format!("the store's CA file is not PEM: {}", Words::of(&error).reason())))?;
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
}
