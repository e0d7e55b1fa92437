//! Put, get, pin, unpin, evict, lose power, reopen, in any order: a get is the exact bytes or a miss, the size holds,
//! what is listed is as whole as it was, and what is pinned stays.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::power_cut::CutVolume;
use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;

const IMAGES: u32 = 5;
const BYTES_MAX: u64 = 6000;
const LAYER_BYTES: usize = 1000;

/// The layer that all images have, and one for each.
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

/// A manifest by its number, or a layer by its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    Manifest(u32),
    Layer(u32),
}

fn things_of(image: u32) -> [Thing; 3] {
    [Thing::Manifest(image), Thing::Layer(image), Thing::Layer(BASE)]
}

struct Play {
    fs: Arc<CutVolume>,
    store: Option<Store>,
    now: u64,
    /// What each image that is listed had when last looked at.
    had: Vec<Option<BTreeSet<Thing>>>,
}

impl Play {
    fn new() -> Self {
        let fs = Arc::new(CutVolume::new(usize::MAX));
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
        let ground = Ground {
            fs: Arc::clone(&self.fs) as Arc<dyn FileSystem>,
            folder: None,
        };
        self.store = Some(ground.open_with_room(BYTES_MAX, at(self.now)));
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// What is held of it: exact, or the test fails.
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
                // It may have been let go just before, and is listed anew now.
                self.had[usize::try_from(*number).unwrap()] = None;
                let bytes = image_of(*number);
                put_manifest(self.store(), &bytes, "library/alpine").unwrap();
                let variant = variant(1, &bytes, self.now);
                self.store().put_tag(&tag(*number), variant).unwrap();
            }
            Step::Layer(number) => match keep_blob(self.store(), &layer(*number)) {
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
            // A pin keeps what is there; what goes at this very moment is gone.
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
            // After the look at what it has: the thread that evicts may be at work in between.
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
    fn in_any_order_a_get_is_exact_or_a_miss_and_nothing_listed_is_broken(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut play = Play::new();
        for step in &steps {
            play.step(step);
            play.check();
        }
    }
}
