//! A tokenizer of the `tokenizers` crate in both of its modes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::TrainerWrapper;
use tokenizers::tokenizer::{
    Encoding, Model, PreTokenizedString, Result, Token, TokenizerBuilder, TokenizerImpl, TruncationDirection,
};
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer as HubTokenizer,
};

/// A model that several tokenizers share: vocabulary and merges are most of what a tokenizer keeps in memory.
#[derive(Clone)]
struct SharedModel(Arc<ModelWrapper>);

impl Model for SharedModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }
    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }
    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }
    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }
    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }
    fn get_trainer(&self) -> TrainerWrapper {
        self.0.get_trainer()
    }
    fn tokenize_in_pretokenized(
        &self,
        text: &mut PreTokenizedString,
        truncation: Option<(usize, TruncationDirection)>,
    ) -> Result<()> {
        self.0.tokenize_in_pretokenized(text, truncation)
    }
}

type Shared = TokenizerImpl<SharedModel, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The same tokenizer twice: special tokens in the text are parsed, or are text like any other.
pub struct HubPair {
    parsing: Shared,
    plain: Shared,
}

impl HubPair {
    pub fn new(tokenizer: &HubTokenizer) -> HubPair {
        // Truncation and padding are left behind: a file that was saved after training holds those of its batches, and a prompt is
        // neither cut nor filled up.
        let parsing = TokenizerBuilder::new()
            .with_model(SharedModel(Arc::new(tokenizer.get_model().clone())))
            .with_normalizer(tokenizer.get_normalizer().cloned())
            .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
            .with_post_processor(tokenizer.get_post_processor().cloned())
            .with_decoder(tokenizer.get_decoder().cloned())
            .with_added_vocabulary(tokenizer.get_added_vocabulary().clone())
            .build()
            .expect("fails without a model only");
        let mut plain: Shared = parsing.clone();
        plain.set_encode_special_tokens(true);
        HubPair { parsing, plain }
    }

    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Encoding> {
        let tokenizer = if parse_special { &self.parsing } else { &self.plain };
        tokenizer.encode_fast(text, add_special)
    }
}
