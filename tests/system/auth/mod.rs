//! Authentication of clients, authorization at the upstream, and the isolation of clients from each other.

pub mod api_challenge;
pub mod authorization;
pub mod cache_users;
pub mod denials;
pub mod isolation;
pub mod local_tokens;
pub mod redirected_registry;
pub mod shared_credentials;
pub mod token_realms;
pub mod token_service;
pub mod ungranted_clients;
