//! The same bits in any batch: for each image the logits are bit for bit the same alone and at any position of any
//! batch, with one thread or two. An empirical property of ONNX Runtime on the machine that runs this.

use nfold::checkpoint::Checkpoint;
use nfold::engine::{Backend, Batch, EngineOptions, Fitted, OrtBackend};
use nfold::fold::{FoldOptions, fold};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

use crate::golden::{FAMILIES, goldens_folder, ways_to_run};

const IMAGES: usize = 32;
const BATCHES: [usize; 6] = [2, 3, 7, 8, 16, 32];

#[test]
fn logits_do_not_depend_on_the_batch() {
    for name in FAMILIES {
        let checkpoint = Checkpoint::open(&goldens_folder().join(name)).unwrap();
        let options = FoldOptions { size: nfold::fold::Size::Fixed(67, 64), ..FoldOptions::default() };
        let folded = fold(&checkpoint, &options).unwrap();
        for (graph, how) in ways_to_run(folded.onnx) {
            check(&format!("{name}{how}"), &graph);
        }
    }
}

fn check(name: &str, graph: &Fitted) {
    let open = |intra_threads| {
        let options = EngineOptions { intra_threads, ..EngineOptions::default() };
        OrtBackend::open_fitted(graph, name, &options).unwrap()
    };
    let mut pool = Batch::zeros(IMAGES, 67, 64);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    pool.data.iter_mut().for_each(|v| *v = StandardNormal.sample(&mut rng));
    let len = pool.data.len() / IMAGES;
    let batch_of = |members: &[usize]| {
        let data = members.iter().flat_map(|&i| &pool.data[i * len..(i + 1) * len]).copied().collect();
        Batch { images: members.len(), height: 67, width: 64, data }
    };
    let bits = |row: &[f32]| row.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
    let mut one = open(1);
    let alone: Vec<_> = (0..IMAGES).map(|i| bits(one.run(&batch_of(&[i])).unwrap().row(0))).collect();
    assert!(alone.windows(2).all(|pair| pair[0] != pair[1]), "{name}: images must differ");
    for threads in [1, 2] {
        let mut backend = open(threads);
        for size in BATCHES {
            for start in [0, 5, 19] {
                let members: Vec<usize> = (start..start + size).map(|i| i % IMAGES).collect();
                let logits = backend.run(&batch_of(&members)).unwrap();
                for (row, &image) in members.iter().enumerate() {
                    assert!(
                        bits(logits.row(row)) == alone[image],
                        "{name}: image {image} at row {row} of {size} with {threads} threads"
                    );
                }
            }
        }
    }
}
