//! The key-value cache as a list that grows.

use tch::{Device, Kind, Tensor};

use crate::common::{leaf, noise};
use flowhn_attn::KvCache;

#[test]
fn tokens_come_back_in_order_however_they_came() {
    let (k, v) = (noise(&[2, 200, 2, 4], 1, Kind::Float), noise(&[2, 200, 2, 4], 2, Kind::Float));
    let positions: Vec<i64> = (0..200).map(|i| 3 * i + 1).collect();
    let segments = Tensor::arange(400, (Kind::Int64, Device::Cpu)).view([2, 200]);
    let mut cache = KvCache::new();
    let mut capacities = vec![];
    let mut start = 0;
    for len in [1, 0, 3, 1, 60, 1, 1, 100, 33] {
        let part = |x: &Tensor| x.narrow(1, start, len);
        let range = start as usize..(start + len) as usize;
        cache.append(&part(&k), &part(&v), &positions[range], Some(&part(&segments))).unwrap();
        start += len;
        assert_eq!(cache.keys().unwrap().unwrap(), k.narrow(1, 0, start));
        assert_eq!(cache.values().unwrap().unwrap(), v.narrow(1, 0, start));
        assert_eq!(cache.segments().unwrap().unwrap(), segments.narrow(1, 0, start));
        assert_eq!(cache.positions().unwrap().host(), &positions[..start as usize]);
        assert_eq!((cache.len() as i64, cache.last_position()), (start, positions[..start as usize].last().copied()));
        capacities.push(cache.capacity());
    }
    assert_eq!(start, 200);
    assert_eq!(capacities, [64, 64, 64, 64, 128, 128, 128, 256, 256], "room doubles");
    assert_eq!(cache.n_bytes(), 2 * 256 * (2 * 2 * 4 * 4 + 8));
    cache.clear();
    assert!(cache.is_empty() && cache.n_bytes() == 0 && cache.keys().unwrap().is_none());
}

#[test]
fn single_tokens_do_not_move_the_memory() {
    let mut cache = KvCache::new();
    let mut moves = 0;
    let mut place = std::ptr::null_mut();
    for i in 0..1000 {
        let token = noise(&[1, 1, 1, 2], i, Kind::BFloat16);
        cache.append(&token, &token, &[i as i64], None).unwrap();
        let now = cache.keys().unwrap().unwrap().data_ptr();
        moves += usize::from(now != place);
        place = now;
    }
    assert_eq!(moves, 5, "64, 128, 256, 512, 1024");
    assert_eq!(cache.n_bytes(), 2 * 1024 * 2 * 2);
}

#[test]
fn what_is_cached_is_a_copy_without_a_graph() {
    let k = leaf(&noise(&[1, 2, 1, 4], 1, Kind::Float));
    let mut cache = KvCache::new();
    cache.append(&(&k * 2.), &k, &[0, 1], None).unwrap();
    let cached = cache.values().unwrap().unwrap();
    assert!(!cached.requires_grad());
    let before = cached.copy();
    let _ = tch::no_grad(|| k.shallow_clone().fill_(9.));
    assert_eq!(cached, before);
}

#[test]
fn a_refused_append_leaves_the_cache_as_it_was() {
    let token = noise(&[2, 1, 2, 4], 1, Kind::Float);
    let segment = Tensor::zeros([2, 1], (Kind::Int64, Device::Cpu));
    let mut cache = KvCache::new();
    cache.append(&token, &token, &[7], None).unwrap();
    let mut refused = |k: &Tensor, v: &Tensor, positions: &[i64], segments: Option<&Tensor>, want: &str| {
        let message = cache.append(k, v, positions, segments).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
        assert_eq!((cache.len(), cache.last_position()), (1, Some(7)));
        assert_eq!(cache.keys().unwrap().unwrap(), token);
    };
    refused(&token, &token, &[7], None, "7 comes after 7");
    refused(&token, &token, &[8, 9], None, "k_bmkp has shape [2, 1, 2, 4], expected [2, 2, 2, 4]");
    refused(&token, &token.narrow(2, 0, 1), &[8], None, "v_bmkp has shape [2, 1, 1, 4]");
    refused(&token, &token, &[8], Some(&segment), "with all tokens of a cache or with none");
    let narrow = token.narrow(3, 0, 2);
    refused(&narrow, &narrow, &[8], None, "k_bmkp has shape [2, 1, 2, 2], expected [2, 1, 2, 4]");
    let one = token.narrow(0, 0, 1);
    refused(&one, &one, &[8], None, "expected [2, 1, 2, 4]");
    let double = token.to_kind(Kind::Double);
    refused(&double, &double, &[8], None, "k_bmkp is Double, expected Float");
    refused(&token, &double, &[8], None, "v_bmkp is Double, expected Float");
}
