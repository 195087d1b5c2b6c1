//! Tokens by what they are for.

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Begins a text.
    Bos,
    /// Ends a text.
    Eos,
    /// Ends a turn of a conversation.
    Eot,
    /// Stands for what the vocabulary cannot spell.
    Unk,
    Pad,
    /// Filling in the middle: before what stands before the gap.
    FimPrefix,
    /// Before what stands behind the gap.
    FimSuffix,
    /// Where the model begins to fill the gap.
    FimMiddle,
    FimPad,
    /// Before the name of a repository.
    FimRepo,
    /// Between files of a repository.
    FimSeparator,
}

impl Special {
    pub const ALL: [Special; 11] = [
        Special::Bos,
        Special::Eos,
        Special::Eot,
        Special::Unk,
        Special::Pad,
        Special::FimPrefix,
        Special::FimSuffix,
        Special::FimMiddle,
        Special::FimPad,
        Special::FimRepo,
        Special::FimSeparator,
    ];

    /// In the order of `GgufVocab::fim`.
    pub const FIM: [Special; 6] = [
        Special::FimPrefix,
        Special::FimSuffix,
        Special::FimMiddle,
        Special::FimPad,
        Special::FimRepo,
        Special::FimSeparator,
    ];

    /// After these a model has filled the gap and goes on with another file.
    pub const FIM_ENDS: [Special; 3] = [Special::FimPad, Special::FimRepo, Special::FimSeparator];

    /// How models spell it where their files do not say which token it is: the spellings that llama.cpp knows. The first one that
    /// the vocabulary has counts, so those that end a turn stand before those that end a document.
    fn spellings(self) -> &'static [&'static str] {
        match self {
            Special::Eot => &[
                "<|eot_id|>",
                "<|im_end|>",
                "<|end|>",
                "<end_of_turn>",
                "<end_of_utterance>",
                "<EOT>",
                "_<EOT>",
                "[EOT]",
                "<|endoftext|>",
                "<|end_of_text|>",
                "<｜end▁of▁sentence｜>",
            ],
            Special::FimPrefix => &[
                "<|fim_prefix|>",
                "<fim-prefix>",
                "<fim_prefix>",
                "<｜fim▁begin｜>",
                "<PRE>",
                "▁<PRE>",
                "<|code_prefix|>",
                "<|prefix|>",
            ],
            Special::FimSuffix => &[
                "<|fim_suffix|>",
                "<fim-suffix>",
                "<fim_suffix>",
                "<｜fim▁hole｜>",
                "<SUF>",
                "▁<SUF>",
                "<|code_suffix|>",
                "<|suffix|>",
            ],
            Special::FimMiddle => &[
                "<|fim_middle|>",
                "<fim-middle>",
                "<fim_middle>",
                "<｜fim▁end｜>",
                "<MID>",
                "▁<MID>",
                "<|code_middle|>",
                "<|middle|>",
            ],
            Special::FimPad => &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
            Special::FimRepo => &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
            Special::FimSeparator => &["<|file_sep|>"],
            Special::Bos | Special::Eos | Special::Unk | Special::Pad => &[],
        }
    }
}

/// The tokens of a vocabulary by what they are for.
#[derive(Clone, Debug, Default)]
pub(super) struct Specials([Option<u32>; Special::ALL.len()]);

impl Specials {
    /// From what the files say, where they say something, and by spelling; `id_of` looks a spelling up.
    pub fn new(said: impl Fn(Special) -> Option<u32>, id_of: impl Fn(&str) -> Option<u32>) -> Specials {
        let by_spelling = |special: Special| special.spellings().iter().find_map(|text| id_of(text));
        Specials(Special::ALL.map(|special| said(special).or_else(|| by_spelling(special))))
    }

    pub fn get(&self, special: Special) -> Option<u32> {
        self.0[special as usize]
    }
}

/// Whether a token's text is a spelling that [`Specials::new`] looks up.
pub(super) fn is_spelling(text: &str) -> bool {
    // Most tokens are words.
    text.contains(['<', '[']) && Special::ALL.iter().any(|s| s.spellings().contains(&text))
}
