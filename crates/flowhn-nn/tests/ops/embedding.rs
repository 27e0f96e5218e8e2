use flowhn_nn::{Embedding, Init, Params, embedding, reference};
use flowhn_torch::testing::gradcheck;
use tch::{Device, Kind, Tensor};

use crate::support::{assert_same_on_any_threads, ids, noise, value_and_grads};

#[test]
fn gradients_agree_with_differences() {
    let tokens = ids(&[2, 5], 4, 1);
    let weight = noise(&[4, 3], 2).set_requires_grad(true);
    gradcheck(|inputs| embedding(&inputs[0], &tokens, Kind::Double, None), &[weight], 1e-6, 1e-8).unwrap();
}

#[test]
fn values_and_gradients_are_those_of_the_look_up() {
    for (shape, vocab_size, d) in [(&[2, 7][..], 11, 33), (&[5], 1, 1), (&[0], 3, 4), (&[3, 50], 64, 128), (&[], 3, 5)]
    {
        let tokens = ids(shape, vocab_size, 3);
        let weight = noise(&[vocab_size, d], 4).to_kind(Kind::Float);
        let inputs = [weight.shallow_clone(), tokens];
        let got = value_and_grads(|x| embedding(&x[0], &x[1], Kind::Float, None), &inputs);
        let want = value_and_grads(|x| Ok(reference::embedding(&x[0], &x[1], Kind::Float)), &inputs);
        assert!(got[0].equal(&want[0]), "{shape:?}");
        assert!(got[1].allclose(&want[1], 1e-6, 1e-6, false), "{shape:?}");
    }
}

#[test]
fn bf16_gradients_are_summed_in_f32() {
    let weight = noise(&[2, 3], 5).to_kind(Kind::Float).set_requires_grad(true);
    // 1001 times 1 is not a bf16 number; a sum kept in bf16 would stop at 256.
    let tokens = Tensor::zeros([1001], (Kind::Int64, Device::Cpu));
    let x = embedding(&weight, &tokens, Kind::BFloat16, None).unwrap();
    assert_eq!(x.kind(), Kind::BFloat16);
    x.sum(Kind::Float).backward();
    assert_eq!(weight.grad().kind(), Kind::Float);
    assert_eq!(Vec::<f32>::try_from(weight.grad().view(-1)).unwrap(), [1001., 1001., 1001., 0., 0., 0.]);
}

#[test]
fn the_padding_row_gets_no_gradient() {
    let mut params = Params::new(Device::Cpu, 0);
    let init = Init::Normal { std: 1. };
    let table = Embedding::new(&mut params.root(), "embed", 5, 3, init, Some(2)).unwrap();
    let tokens = Tensor::from_slice(&[2i64, 1, 2, 4]);
    let x = table.forward(&tokens, Kind::Float).unwrap();
    assert!(x.get(0).equal(&table.weight().master().get(2)));
    x.sum(Kind::Float).backward();
    let grad = table.weight().master().grad().sum_dim_intlist(1i64, false, Kind::Float);
    assert_eq!(Vec::<f32>::try_from(grad).unwrap(), [0., 3., 0., 0., 3.]);
    let outside = Embedding::new(&mut params.root(), "other", 5, 3, Init::Zeros, Some(5));
    assert!(outside.unwrap_err().to_string().contains("padding id 5 is not in 0..5"));
}

#[test]
fn strided_ids_and_weights_are_read_in_order() {
    let weight = noise(&[4, 6], 6).to_kind(Kind::Float);
    let tokens = ids(&[3, 5], 4, 7);
    let got = embedding(&weight.tr().contiguous().tr(), &tokens.tr(), Kind::Float, None).unwrap();
    assert!(got.equal(&reference::embedding(&weight, &tokens.tr(), Kind::Float)));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    assert_same_on_any_threads(|| {
        let inputs = [noise(&[97, 129], 8).to_kind(Kind::Float), ids(&[1031], 97, 9)];
        value_and_grads(|x| embedding(&x[0], &x[1], Kind::Float, None), &inputs)
    });
}

#[test]
fn bad_arguments_are_named() {
    let weight = Tensor::zeros([4, 2], (Kind::Float, Device::Cpu));
    let message = |ids: &Tensor, kind| embedding(&weight, ids, kind, None).unwrap_err().to_string();
    let tokens = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 0]).view([2, 3]);
    assert_eq!(message(&tokens, Kind::Float), "embedding: ids[1, 1] is 4, expected 0..4");
    assert!(message(&(tokens.shallow_clone() - 3), Kind::Float).contains("ids[0, 0] is -3"));
    assert!(message(&tokens.to_kind(Kind::Int), Kind::Float).contains("ids is Int"));
    assert!(message(&tokens, Kind::Double).contains("weight_vd is Float"));
    assert!(message(&tokens, Kind::Int64).contains("kind is Int64"));
}
