//! Property test: put, get, pin, unpin, evict, power cut and reopen in any order. A get returns the exact bytes or a
//! miss, the size limit holds, listed images keep their content, and pinned images stay.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::power_cut::PowerCutFs;
use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;

const IMAGES: u32 = 5;
const BYTES_MAX: u64 = 6000;
const LAYER_BYTES: usize = 1000;

/// The layer shared by all images. Each image has another one of its own.
const BASE: u32 = IMAGES;

#[derive(Clone, Debug)]
enum Step {
    Manifest(u32),
    Layer(u32),
    Use(u32),
    Pin(u32),
    Unpin(u32),
    Wait(u64),
    Evict,
    Reopen,
    PowerCut(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..IMAGES).prop_map(Step::Manifest),
        6 => (0..=BASE).prop_map(Step::Layer),
        3 => (0..IMAGES).prop_map(Step::Use),
        1 => (0..IMAGES).prop_map(Step::Pin),
        1 => (0..IMAGES).prop_map(Step::Unpin),
        3 => (600_u64..9000).prop_map(Step::Wait),
        1 => Just(Step::Evict),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(Step::PowerCut),
    ]
}

fn layer(number: u32) -> Vec<u8> {
    (number + 1).to_be_bytes().repeat(LAYER_BYTES / 4)
}

fn image_of(number: u32) -> Bytes {
    let descriptor = |number| {
        let layer = digest(&layer(number));
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":{LAYER_BYTES}}}"#
        )
    };
    let (own, base) = (descriptor(number), descriptor(BASE));
    Bytes::from(format!(
        r#"{{"schemaVersion":2,"mediaType":"{IMAGE}","layers":[{own},{base}]}}"#
    ))
}

fn tag(number: u32) -> TagKey {
    key(&number.to_string())
}

/// A manifest by its number, or a layer by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    Manifest(u32),
    Layer(u32),
}

fn things_of(image: u32) -> [Thing; 3] {
    [Thing::Manifest(image), Thing::Layer(image), Thing::Layer(BASE)]
}

struct Play {
    fs: Arc<PowerCutFs>,
    store: Option<Store>,
    now: u64,
    /// Content of each listed image at the last check.
    had: Vec<Option<BTreeSet<Thing>>>,
}

impl Play {
    fn new() -> Self {
        let fs = Arc::new(PowerCutFs::new(usize::MAX));
        let mut play = Self {
            fs,
            store: None,
            now: 0,
            had: vec![None; usize::try_from(IMAGES).unwrap()],
        };
        play.open();
        play
    }

    fn open(&mut self) {
        let fixture = Fixture {
            fs: Arc::clone(&self.fs) as Arc<dyn FileSystem>,
            folder: None,
        };
        self.store = Some(fixture.open_with_limit(BYTES_MAX, at(self.now)));
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Returns whether it is stored. Wrong bytes fail the test.
    fn has(&self, thing: Thing) -> bool {
        match thing {
            Thing::Layer(number) => {
                let found = read_blob(self.store(), &digest(&layer(number)));
                found.is_some_and(|found| {
                    assert_eq!(found, layer(number));
                    true
                })
            }
            Thing::Manifest(number) => {
                let found = self.store().manifest(&digest(&image_of(number))).unwrap();
                found.is_some_and(|found| {
                    assert_eq!(found.bytes, image_of(number));
                    true
                })
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Manifest(number) => {
                // The image may have been evicted just before, and is listed again now.
                self.had[usize::try_from(*number).unwrap()] = None;
                let bytes = image_of(*number);
                put_manifest(self.store(), &bytes, "library/alpine").unwrap();
                let variant = variant(1, &bytes, self.now);
                self.store().put_tag(&tag(*number), variant).unwrap();
            }
            Step::Layer(number) => match put_blob(self.store(), &layer(*number)) {
                Ok(()) => {
                    let usage = self.store().usage();
                    assert!(usage.blob_bytes + usage.manifest_bytes <= BYTES_MAX, "{usage:?}");
                }
                Err(fault) => assert!(matches!(fault, StoreError::OverQuota { .. }), "{fault}"),
            },
            Step::Use(number) => {
                let used = ContentId::Manifest(digest(&image_of(*number)));
                self.store().touch(used, at(self.now));
            }
            // A pin protects stored content only. A concurrent eviction may already have removed some.
            Step::Pin(number) => {
                self.had[usize::try_from(*number).unwrap()] = None;
                self.store().pin(&Pin::Tag(tag(*number))).unwrap();
            }
            Step::Unpin(number) => {
                self.store().unpin(&Pin::Tag(tag(*number))).unwrap();
            }
            Step::Wait(seconds) => {
                self.now += seconds;
                self.store().tick(at(self.now));
            }
            Step::Evict => {
                self.store().evictor.relieve_full_disk(2500);
            }
            Step::Reopen => {
                self.store().close();
                self.store = None;
                self.open();
            }
            Step::PowerCut(chance) => {
                self.store = None;
                self.fs = Arc::new(self.fs.after_by_chance(*chance));
                self.open();
            }
        }
    }

    fn check(&mut self) {
        for image in 0..IMAGES {
            let has: BTreeSet<Thing> = things_of(image)
                .into_iter()
                .filter(|thing| self.has(*thing))
                .collect();
            // Read the tag after the content, because the eviction thread may run in between.
            let is_listed = self.store().tag(&tag(image)).unwrap().is_some();
            let had = self.had[usize::try_from(image).unwrap()].take();
            let is_pinned = self.store().pins().contains(&Pin::Tag(tag(image)));
            if let Some(had) = had {
                assert!(is_listed || !is_pinned, "image {image} was pinned");
                assert!(
                    !is_listed || had.is_subset(&has),
                    "image {image} is listed with {has:?} and had {had:?}"
                );
            }
            self.had[usize::try_from(image).unwrap()] = is_listed.then_some(has);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn any_operation_order_keeps_listed_images_complete(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut play = Play::new();
        for step in &steps {
            play.step(step);
            play.check();
        }
    }
}
