#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use super::*;
use crate::server::tls::cert_dir::set_validity;

const NOW: Duration = Duration::from_secs(1_700_000_000);
const DAY: Duration = Duration::from_secs(86_400);

/// A CA in DER with its key. It signs certificates that expire ten days after [`NOW`].
struct Signing(Vec<u8>, Issuer<'static, KeyPair>);

fn signing() -> Signing {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let der = params.self_signed(&key).unwrap().der().to_vec();
    Signing(der, Issuer::new(params, key))
}

impl Signing {
    fn client(&self, change: impl FnOnce(&mut CertificateParams)) -> ClientCert {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        set_validity(&mut params, SystemTime::UNIX_EPOCH + NOW, 10);
        change(&mut params);
        let signed = params.signed_by(&KeyPair::generate().unwrap(), &self.1).unwrap();
        ClientCert::new(&[signed.der().clone()])
    }

    fn identify(&self, shown: &ClientCert, after: Duration) -> Result<Arc<str>, String> {
        let authorities = ClientCaVerifier::new(std::slice::from_ref(&self.0)).unwrap();
        authorities.identify(shown, SystemTime::UNIX_EPOCH + NOW + after)
    }
}

fn common(params: &mut CertificateParams, name: &str) {
    params.distinguished_name.push(DnType::CommonName, name);
}

#[test]
fn common_name_wins_over_alternative_names() {
    let ca = signing();
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let uri = || SanType::URI("spiffe://example.org/ci".try_into().unwrap());
    let mail = || SanType::Rfc822Name("ci@example.org".try_into().unwrap());
    let address = || SanType::IpAddress([192, 0, 2, 1].into());
    let named = |change: &dyn Fn(&mut CertificateParams)| {
        let shown = ca.client(|params| change(params));
        ca.identify(&shown, Duration::ZERO)
            .map(|name| name.to_string())
            .map_err(|why| why.contains("it has no usable name"))
    };
    let with = |names: Vec<SanType>| named(&|params| params.subject_alt_names.clone_from(&names));
    assert_eq!(named(&|params| common(params, "node-7")), Ok("node-7".to_owned()));
    let both = named(&|params| {
        common(params, "node-7");
        params.subject_alt_names = vec![uri()];
    });
    assert_eq!(both, Ok("node-7".to_owned()));
    assert_eq!(with(vec![uri()]), Ok("spiffe://example.org/ci".to_owned()));
    assert_eq!(
        with(vec![address(), dns("ci.example.org"), uri()]),
        Ok("ci.example.org".to_owned())
    );
    assert_eq!(with(vec![mail()]), Ok("ci@example.org".to_owned()));
    for nobody in [
        named(&|_| {}),
        named(&|params| common(params, "")),
        named(&|params| common(params, "node-7\nadmin")),
        named(&|params| common(params, "node-7\0.evil")),
        with(vec![address()]),
    ] {
        assert_eq!(nobody, Err(true));
    }
}

#[test]
fn verified_certificate_is_rejected_after_expiry() {
    let ca = signing();
    let authorities = ClientCaVerifier::new(std::slice::from_ref(&ca.0)).unwrap();
    let shown = ca.client(|params| common(params, "node-7"));
    let at = |after| authorities.identify(&shown, SystemTime::UNIX_EPOCH + NOW + after);
    assert_eq!(&*at(Duration::ZERO).unwrap(), "node-7");
    assert_eq!(&*at(9 * DAY).unwrap(), "node-7");
    assert_eq!(at(12 * DAY).unwrap_err(), "it has expired");
    assert_eq!(
        &*at(Duration::ZERO).unwrap(),
        "node-7",
        "a clock set back says so again"
    );
}

#[test]
fn another_ca_vouches_for_nobody_here() {
    let (ca, other) = (signing(), signing());
    let shown = other.client(|params| common(params, "node-7"));
    assert_eq!(
        ca.identify(&shown, Duration::ZERO).unwrap_err(),
        "no CA of `access.client_ca` has signed it"
    );
    assert!(ClientCaVerifier::new(&[b"no certificate".to_vec()]).is_err());
}
