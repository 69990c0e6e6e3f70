//! Continuing text: the cache against the whole forward, few plans, stops, limits.

use tallow_core::op::Role;
use tallow_llm::{
    Adapter, AdapterConfig, Decoder, FinishReason, GenerateOptions, Generated, Generator, Model,
    Sampling, Targets, Tokenizer,
};

use crate::support::*;

/// Logits after all of `ids`, fed in pieces of these lengths (the last takes the rest).
fn fed(decoder: &mut Decoder, ids: &[u32], cuts: &[usize]) -> Vec<f32> {
    decoder.reset();
    let mut rest = ids;
    for cut in cuts {
        let (now, later) = rest.split_at(*cut);
        decoder.feed(now).unwrap();
        rest = later;
    }
    let out = decoder.feed(rest).unwrap().to_vec();
    assert_eq!(decoder.position(), ids.len());
    out
}

#[test]
fn however_the_tokens_are_fed_the_scores_are_those_of_the_whole_text() {
    for name in GOLDENS {
        let model = load(&golden(name));
        let a = adapter(&model, &golden(name));
        let ids = some_ids(200, model.config.vocab);
        for adapter in [None, Some(&a)] {
            let want = logits(&model, adapter, &ids);
            let mut decoder = Decoder::new(&model, adapter, 200).unwrap();
            for n in [1, 2, 15, 16, 17, 80, 81, 128, 129, 200] {
                let got = fed(&mut decoder, &ids[..n], &[]);
                let d = distance(&got, &want[n - 1]);
                assert!(d < 2e-5, "{name}, {n} tokens: {d}");
            }
            for cuts in [vec![1; 50], vec![3, 17, 1, 1], vec![130, 1, 40]] {
                let d = distance(&fed(&mut decoder, &ids, &cuts), &want[199]);
                assert!(d < 2e-5, "{name}, {cuts:?}: {d}");
            }
        }
    }
}

#[test]
fn padding_changes_nothing() {
    for name in GOLDENS {
        let model = load(&golden(name));
        let a = adapter(&model, &golden(name));
        let vocab = model.config.vocab;
        let text = some_ids(19, vocab);
        let want = logits(&model, Some(&a), &text).concat();
        // A batch of two: the text with 13 rows of padding behind it, and another of full length.
        let mut ids = text.clone();
        ids.extend([vocab as u32 - 1; 13]);
        ids.extend(some_ids(32, vocab));
        let mut pos: Vec<u32> = (0..19).collect();
        pos.extend([NONE; 13]);
        pos.extend(0..32);
        let (id, pos) = leaves(&model, &ids, &pos, 2);
        let hidden = model.hidden(&id, &pos, Some(&a), None).unwrap();
        let all = model.session.read(&model.logits(&hidden.x).unwrap());
        let d = distance(&all.unwrap()[..19 * vocab], &want);
        assert!(d < 1e-5, "{name}: {d}");
        // The loss too, with targets that are not counted.
        let targets = |n: usize, pad: usize| -> Vec<u32> {
            let padding = std::iter::repeat_n(NONE, pad);
            text[1..=n].iter().copied().chain(padding).collect()
        };
        let loss = |ids: &[u32], pos: &[u32], targets: &[u32]| {
            let (id, pos) = leaves(&model, ids, pos, 1);
            let (target, _) = rows(&model, targets, 1);
            let x = model.hidden(&id, &pos, Some(&a), None).unwrap().x;
            let nll = model.nll(&x, &target).unwrap();
            model.session.read(&nll).unwrap()
        };
        let positions: Vec<u32> = (0..18).collect();
        let short = loss(&text[..18], &positions, &targets(18, 0));
        let padded_pos: Vec<u32> = positions.iter().copied().chain([NONE; 14]).collect();
        let long = loss(&ids[..32], &padded_pos, &targets(18, 14));
        assert!(distance(&short, &long[..18]) < 1e-5, "{name}");
        assert!(long[18..].iter().all(|v| *v == 0.0), "{name}");
    }
}

fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: Sampling::greedy(),
        max_new_tokens,
        stop: vec![],
        ignore_eos: false,
    }
}

fn built_in() -> (Model, Tokenizer) {
    (load(&tiny()), Tokenizer::open(&tiny()).unwrap())
}

#[test]
fn two_hundred_lengths_make_few_plans() {
    // The smallest model, with more positions than it was made for; any tokenizer knows its ids.
    let dir = with_config(&golden("llama"), |c| {
        c.insert("max_position_embeddings".into(), 4096.into());
    });
    let (model, tokenizer) = (load(dir.path()), Tokenizer::open(&tiny()).unwrap());
    let mut generator = Generator::new(&model, None, greedy(2)).unwrap();
    for i in 1..=200 {
        // From 1 to 1000 tokens, and one long one.
        let length = if i == 200 { 4000 } else { 1 + (i * 37) % 1000 };
        let prompt = some_ids(length, model.config.vocab);
        let mut stream = generator.stream_ids(&tokenizer, prompt).unwrap();
        assert!(stream.by_ref().all(|piece| piece.is_ok()));
    }
    let plans = model.session.cached_plans();
    assert!(plans <= 8, "{plans} plans");
}

fn text(generator: &mut Generator, tokenizer: &Tokenizer, prompt: &str) -> Generated {
    generator.generate(tokenizer, prompt).unwrap()
}

#[test]
fn greedy_text_is_the_likeliest_token_of_the_whole_forward() {
    let (model, tokenizer) = built_in();
    let config = AdapterConfig::new(8, 16.0, Targets::AllLinear);
    let a = Adapter::new(&model, &config, 5).unwrap();
    let noise: Vec<f32> = (0..a.elems()).map(|i| (i as f32).sin() * 0.05).collect();
    model.session.write(&a.params, &noise).unwrap();
    let prompt = "question: how many people live in";
    let mut texts = vec![];
    for adapter in [None, Some(&a)] {
        let mut generator = Generator::new(&model, adapter, greedy(12)).unwrap();
        let out = text(&mut generator, &tokenizer, prompt);
        let mut ids = tokenizer.encode_prompt(prompt, &model.config).unwrap();
        for (i, id) in out.ids.iter().enumerate() {
            let scores = logits(&model, adapter, &ids).pop().unwrap();
            let best = scores.iter().copied().fold(f32::MIN, f32::max);
            assert!(scores[*id as usize] > best - 1e-4, "token {i}");
            ids.push(*id);
        }
        texts.push(out.text);
    }
    assert_ne!(texts[0], texts[1]);
}

#[test]
fn pieces_make_the_text_and_do_not_depend_on_earlier_prompts() {
    let (model, tokenizer) = built_in();
    let options = GenerateOptions {
        sampling: Sampling {
            temperature: 1.0,
            top_k: 50,
            seed: 11,
            ..Sampling::greedy()
        },
        ..greedy(40)
    };
    let mut generator = Generator::new(&model, None, options).unwrap();
    let first = text(&mut generator, &tokenizer, "select name");
    let long = "a long prompt ".repeat(40);
    let other = text(&mut generator, &tokenizer, &long);
    assert_ne!(first.text, other.text);
    assert_eq!(text(&mut generator, &tokenizer, "select name"), first);
    let mut stream = generator.stream(&tokenizer, "select name").unwrap();
    let pieces: Vec<_> = stream.by_ref().map(|p| p.unwrap()).collect();
    let joined: String = pieces.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(joined, first.text);
    let ids: Vec<u32> = pieces.iter().filter_map(|p| p.token).collect();
    assert_eq!((stream.ids(), ids.as_slice()), (&*first.ids, &*first.ids));
    assert_eq!(stream.finish_reason(), Some(first.finish));
}

#[test]
fn text_ends_for_one_of_four_reasons() {
    let (model, tokenizer) = built_in();
    let run = |options: GenerateOptions, prompt: &str| {
        let mut generator = Generator::new(&model, None, options).unwrap();
        text(&mut generator, &tokenizer, prompt)
    };
    let all = run(greedy(30), "question:");
    let ended = run(greedy(0), "question:");
    assert_eq!(ended.finish, FinishReason::MaxNewTokens);
    assert!(ended.text.is_empty() && ended.ids.is_empty());
    // A stop string in the middle of what it says anyway.
    let middle = all
        .text
        .char_indices()
        .nth(all.text.chars().count() / 2)
        .unwrap()
        .0;
    let stop: String = all.text[middle..].chars().take(3).collect();
    let stopped = run(
        GenerateOptions {
            stop: vec![stop.clone()],
            ..greedy(30)
        },
        "question:",
    );
    assert_eq!(stopped.finish, FinishReason::Stop);
    let at = all.text.find(&stop).unwrap();
    assert_eq!(stopped.text, all.text[..at]);
    // The model's own end: whatever it says first is declared to be one.
    let mut ends = load(&tiny());
    ends.config.eos = vec![all.ids[3]];
    let mut generator = Generator::new(&ends, None, greedy(30)).unwrap();
    let out = text(&mut generator, &tokenizer, "question:");
    let before = all.ids.iter().position(|id| *id == all.ids[3]).unwrap();
    assert_eq!((out.finish, out.ids.len()), (FinishReason::Eos, before));
    let through = GenerateOptions {
        ignore_eos: true,
        ..greedy(30)
    };
    let mut generator = Generator::new(&ends, None, through).unwrap();
    assert_eq!(text(&mut generator, &tokenizer, "question:").ids.len(), 30);
    // The end of the model's positions: the last one still has a successor.
    let mut ids = some_ids(1020, model.config.vocab);
    let endless = GenerateOptions {
        ignore_eos: true,
        ..greedy(50)
    };
    let mut generator = Generator::new(&model, None, endless).unwrap();
    let mut stream = generator.stream_ids(&tokenizer, ids.clone()).unwrap();
    assert!(stream.by_ref().all(|p| p.is_ok()));
    assert_eq!(stream.finish_reason(), Some(FinishReason::MaxPositions));
    assert_eq!(stream.ids().len(), 5);
    ids.extend([1; 5]);
    let text = message(generator.stream_ids(&tokenizer, ids).map(|_| ()));
    assert!(text.starts_with("1025 tokens are too many"), "{text}");
    assert!(text.contains("holds 1024"), "{text}");
}

#[test]
fn bad_prompts_and_options_are_one_sentence() {
    let (model, tokenizer) = built_in();
    let mut generator = Generator::new(&model, None, greedy(3)).unwrap();
    let text = message(generator.stream_ids(&tokenizer, vec![]).map(|_| ()));
    assert!(
        text.starts_with("prompt: want at least one token"),
        "{text}"
    );
    let unknown = model.config.vocab as u32;
    let mut stream = generator.stream_ids(&tokenizer, vec![unknown]).unwrap();
    let text = message(stream.next().unwrap());
    assert!(text.contains("token 2048 of 2048"), "{text}");
    assert!(stream.next().is_none());
    let mut hot = greedy(3);
    hot.sampling.temperature = f64::NAN;
    assert!(message(Generator::new(&model, None, hot)).starts_with("temperature: want"));
    let mut decoder = Decoder::new(&model, None, 8).unwrap();
    let room = decoder.capacity();
    decoder.feed(&some_ids(room, 2048)).unwrap();
    let text = message(decoder.feed(&[1]).map(|_| ()));
    assert!(text.contains("holds 256"), "{text}");
    let other = load(&golden("llama"));
    let a = Adapter::load(&other, &golden("llama/adapter"), Role::State)
        .unwrap()
        .0;
    let text = message(Generator::new(&model, Some(&a), greedy(3)));
    assert!(text.contains("0 of 14 modules bound"), "{text}");
}
