//! Megatron's pipeline layouts: `Et*3|(tt|)*29,m|L`, or a list of words a stage.
//!
//! Defined by Megatron-Core, `transformer/pipeline_parallel_layer_layout.py`. The steps of the grammar have an order:
//! commas go, `(BODY)*N` is written out once, `c*N` is written out once, `|` separates stages.

use std::fmt;
use std::str::FromStr;

/// The most characters that a layout may have when its repetitions are written out.
const MAX_CHARACTERS: usize = 1 << 18;

/// What a stage holds, in the words of a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerWord {
    /// The embedding (and what stands before it).
    Embedding,
    /// One decoder layer.
    Decoder,
    /// One layer of the multi-token-prediction head.
    Mtp,
    /// The output layer and the loss.
    Loss,
}

impl LayerWord {
    const ALL: [LayerWord; 4] = [Self::Embedding, Self::Decoder, Self::Mtp, Self::Loss];

    /// The character of a layout string.
    #[must_use]
    pub fn character(self) -> char {
        match self {
            Self::Embedding => 'E',
            Self::Decoder => 't',
            Self::Mtp => 'm',
            Self::Loss => 'L',
        }
    }

    /// The word of a list.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Decoder => "decoder",
            Self::Mtp => "mtp",
            Self::Loss => "loss",
        }
    }
}

/// Why a pipeline layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineLayoutError {
    /// Too much to write out.
    #[error(
        "pipeline_model_parallel_layout has more than {limit} characters when its repetitions are written out"
    )]
    TooLong {
        /// The most.
        limit: usize,
    },
    /// A character that stands for nothing.
    #[error(
        "Invalid layer character {character:?} in stage {stage} of pipeline_model_parallel_layout, known layer characters: E, t, m, L (stages are separated by |, repetitions are t*3 or (tt|)*3, without spaces)"
    )]
    Character {
        /// The character.
        character: char,
        /// The stage, from 0, with repetitions written out.
        stage: usize,
    },
    /// A word that stands for nothing.
    #[error(
        "{word:?} in stage {stage} of pipeline_model_parallel_layout is not a layer type: embedding, decoder, mtp or loss"
    )]
    Word {
        /// The word.
        word: String,
        /// The stage, from 0.
        stage: usize,
    },
    /// Stages that do not divide among the pipeline ranks.
    #[error(
        "pipeline_model_parallel_layout has {stages} stages, which is not divisible by pipeline_model_parallel_size {pp_size}"
    )]
    Stages {
        /// Stages of the layout.
        stages: usize,
        /// Pipeline ranks.
        pp_size: usize,
    },
    /// Another number of virtual stages than asked for.
    #[error(
        "virtual_pipeline_model_parallel_size {vpp_size} conflicts with pipeline_model_parallel_layout, which has {found} stages a rank"
    )]
    VirtualStages {
        /// What was asked for.
        vpp_size: usize,
        /// What the layout has.
        found: usize,
    },
    /// The embedding or the loss is missing, doubled or in the wrong place.
    #[error(
        "pipeline_model_parallel_layout must {place} with {} ({}) and have it exactly once, it has {count}", word.word(), word.character()
    )]
    End {
        /// `begin` or `end`.
        place: &'static str,
        /// The layer.
        word: LayerWord,
        /// How many there are.
        count: usize,
    },
    /// Another number of layers than the model's.
    #[error("number of {} layers {found} in pipeline_model_parallel_layout must match {parameter} {expected}", word.word())]
    Layers {
        /// The kind of layer.
        word: LayerWord,
        /// Layers of the layout.
        found: usize,
        /// Megatron's word.
        parameter: &'static str,
        /// Layers of the model.
        expected: usize,
    },
    /// A decoder layer behind the head.
    #[error(
        "decoder layers must be placed before MTP layers in pipeline_model_parallel_layout, stage {stage} has one behind"
    )]
    DecoderBehindMtp {
        /// The stage, from 0.
        stage: usize,
    },
    /// The head is not where Megatron can run it.
    #[error(
        "all MTP layers of pipeline_model_parallel_layout must be in one stage, the last virtual stage of its rank; stage {stage} is not (pipeline rank {pp_rank}, virtual stage {vp_stage})"
    )]
    MtpStage {
        /// The stage, from 0.
        stage: usize,
        /// Its pipeline rank.
        pp_rank: usize,
        /// Its virtual stage.
        vp_stage: usize,
    },
}

/// A layout as it was written: stages of layers. Stage `i` is virtual stage `i / PP` of pipeline rank `i % PP`.
///
/// Whether it fits a model shows when a [`crate::layout::ParallelLayout`] is made of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PipelineLayout {
    stages: Vec<Vec<LayerWord>>,
}

impl PipelineLayout {
    /// A layout of stages.
    #[must_use]
    pub fn new(stages: Vec<Vec<LayerWord>>) -> Self {
        Self { stages }
    }

    /// A layout of words (`embedding`, `decoder`, `mtp`, `loss`, in any case), one list a stage.
    ///
    /// # Errors
    /// [`PipelineLayoutError::Word`] for another word, [`PipelineLayoutError::TooLong`].
    pub fn from_words<S: AsRef<str>>(stages: &[Vec<S>]) -> Result<Self, PipelineLayoutError> {
        let length = stages.iter().map(|stage| stage.len() + 1).sum::<usize>();
        too_long(length)?;
        let layer = |stage: usize, word: &S| {
            let text = word.as_ref().trim();
            LayerWord::ALL
                .into_iter()
                .find(|known| known.word().eq_ignore_ascii_case(text))
                .ok_or_else(|| PipelineLayoutError::Word {
                    word: word.as_ref().to_owned(),
                    stage,
                })
        };
        let stages = stages
            .iter()
            .enumerate()
            .map(|(stage, words)| words.iter().map(|word| layer(stage, word)).collect())
            .collect::<Result<_, _>>()?;
        Ok(Self { stages })
    }

    /// The layers of each stage.
    #[must_use]
    pub fn stages(&self) -> &[Vec<LayerWord>] {
        &self.stages
    }

    /// How many layers of a kind each stage has.
    pub(super) fn counts(&self, word: LayerWord) -> impl Iterator<Item = usize> {
        self.stages
            .iter()
            .map(move |stage| stage.iter().filter(|layer| **layer == word).count())
    }

    /// Checks the layout against a model; gives the number of virtual stages a rank.
    pub(super) fn check(
        &self,
        pp_size: usize,
        vpp_size: Option<usize>,
        num_layers: usize,
        mtp_num_layers: usize,
    ) -> Result<usize, PipelineLayoutError> {
        let stages = self.stages.len();
        if stages == 0 || !stages.is_multiple_of(pp_size) {
            return Err(PipelineLayoutError::Stages { stages, pp_size });
        }
        let found = stages / pp_size;
        if let Some(vpp_size) = vpp_size.filter(|size| *size != found) {
            return Err(PipelineLayoutError::VirtualStages { vpp_size, found });
        }
        let layers = || self.stages.iter().flatten().copied();
        let ends = [
            ("begin", LayerWord::Embedding, layers().next()),
            ("end", LayerWord::Loss, layers().last()),
        ];
        for (place, word, at) in ends {
            let count = self.counts(word).sum();
            if at != Some(word) || count != 1 {
                return Err(PipelineLayoutError::End { place, word, count });
            }
        }
        for (word, parameter, expected) in [
            (LayerWord::Decoder, "num_layers", num_layers),
            (LayerWord::Mtp, "mtp_num_layers", mtp_num_layers),
        ] {
            let found = self.counts(word).sum();
            if found != expected {
                return Err(PipelineLayoutError::Layers {
                    word,
                    found,
                    parameter,
                    expected,
                });
            }
        }
        self.check_mtp(pp_size, found, mtp_num_layers)?;
        Ok(found)
    }

    fn check_mtp(
        &self,
        pp_size: usize,
        vp_size: usize,
        mtp_num_layers: usize,
    ) -> Result<(), PipelineLayoutError> {
        let mut behind = false;
        for (stage, layers) in self.stages.iter().enumerate() {
            for layer in layers {
                behind |= *layer == LayerWord::Mtp;
                if behind && *layer == LayerWord::Decoder {
                    return Err(PipelineLayoutError::DecoderBehindMtp { stage });
                }
            }
        }
        for (stage, count) in self.counts(LayerWord::Mtp).enumerate() {
            let (pp_rank, vp_stage) = (stage % pp_size, stage / pp_size);
            if count > 0 && (count != mtp_num_layers || vp_stage + 1 != vp_size) {
                return Err(PipelineLayoutError::MtpStage {
                    stage,
                    pp_rank,
                    vp_stage,
                });
            }
        }
        Ok(())
    }
}

impl FromStr for PipelineLayout {
    type Err = PipelineLayoutError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        too_long(text.len())?;
        let characters: Vec<char> = text.chars().filter(|c| *c != ',').collect();
        let characters = write_out_characters(&write_out_groups(&characters)?)?;
        let mut stages = vec![Vec::new()];
        for character in characters {
            let stage = stages.len() - 1;
            if character == '|' {
                stages.push(Vec::new());
                continue;
            }
            let layer = LayerWord::ALL
                .into_iter()
                .find(|known| known.character() == character)
                .ok_or(PipelineLayoutError::Character { character, stage })?;
            stages[stage].push(layer);
        }
        Ok(Self { stages })
    }
}

/// Writes `(BODY)*N` out, once and without nesting. BODY is everything up to the next `)`, and not empty.
fn write_out_groups(characters: &[char]) -> Result<Vec<char>, PipelineLayoutError> {
    let mut out = Vec::with_capacity(characters.len());
    let mut at = 0;
    while at < characters.len() {
        let rest = &characters[at..];
        if rest[0] != '(' {
            push(&mut out, &rest[..1], 1)?;
            at += 1;
            continue;
        }
        let close = rest.iter().position(|c| *c == ')').unwrap_or(rest.len());
        match rest.get(close + 1..).and_then(repetition) {
            Some((times, length)) if close > 1 => {
                push(&mut out, &rest[1..close], times)?;
                at += close + 1 + length;
            }
            // An opening parenthesis inside would meet the same closing one.
            _ => {
                let end = rest.len().min(close + 1);
                push(&mut out, &rest[..end], 1)?;
                at += end;
            }
        }
    }
    Ok(out)
}

/// Writes `c*N` out, once.
fn write_out_characters(characters: &[char]) -> Result<Vec<char>, PipelineLayoutError> {
    let mut out = Vec::with_capacity(characters.len());
    let mut at = 0;
    while at < characters.len() {
        let rest = &characters[at..];
        match repetition(&rest[1..]) {
            Some((times, length)) if rest[0] != '\n' => {
                push(&mut out, &rest[..1], times)?;
                at += 1 + length;
            }
            _ => {
                push(&mut out, &rest[..1], 1)?;
                at += 1;
            }
        }
    }
    Ok(out)
}

/// The number and the length of `*N` at the beginning; a number beyond `usize` counts as the largest.
fn repetition(characters: &[char]) -> Option<(usize, usize)> {
    let digits = characters.strip_prefix(&['*'])?;
    let length = digits.iter().take_while(|c| c.is_ascii_digit()).count();
    let times = digits[..length].iter().fold(0usize, |number, digit| {
        let digit = digit.to_digit(10).map_or(0, |digit| digit as usize);
        number.saturating_mul(10).saturating_add(digit)
    });
    (length > 0).then_some((times, 1 + length))
}

/// Appends `body` so many times, within the limit.
fn push(out: &mut Vec<char>, body: &[char], times: usize) -> Result<(), PipelineLayoutError> {
    too_long(out.len().saturating_add(body.len().saturating_mul(times)))?;
    for _ in 0..times {
        out.extend_from_slice(body);
    }
    Ok(())
}

fn too_long(length: usize) -> Result<(), PipelineLayoutError> {
    if length > MAX_CHARACTERS {
        return Err(PipelineLayoutError::TooLong {
            limit: MAX_CHARACTERS,
        });
    }
    Ok(())
}

/// The shortest usual spelling: `Et*3|(tt|)*29mL`. Parsing it gives the same layout.
impl fmt::Display for PipelineLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((last, separated)) = self.stages.split_last() else {
            return Ok(());
        };
        for run in separated.chunk_by(|a, b| a == b) {
            let stage = stage_text(&run[0]);
            let group = format!("({stage}|)*{}", run.len());
            // A group of a few short stages would be longer than they are, and a text near the limit too long to parse.
            if group.len() < run.len() * (stage.len() + 1) {
                f.write_str(&group)?;
            } else {
                (0..run.len()).try_for_each(|_| write!(f, "{stage}|"))?;
            }
        }
        f.write_str(&stage_text(last))
    }
}

fn stage_text(stage: &[LayerWord]) -> String {
    let run_text = |run: &[LayerWord]| {
        let character = run[0].character();
        match run.len() {
            1 => character.to_string(),
            2 => format!("{character}{character}"),
            length => format!("{character}*{length}"),
        }
    };
    stage.chunk_by(|a, b| a == b).map(run_text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written_out(text: &str) -> Result<Vec<String>, PipelineLayoutError> {
        let layout: PipelineLayout = text.parse()?;
        let stage = |layers: &Vec<LayerWord>| layers.iter().map(|one| one.character()).collect();
        Ok(layout.stages().iter().map(stage).collect())
    }

    /// Found by fuzzing: printed with groups throughout, this one was longer than what may be parsed.
    #[test]
    fn a_layout_near_the_limit_is_printed_so_that_it_parses() {
        let text = "Et*3t(|t||)*20,029Et*3t(|t||)*20,029,m|L";
        let layout: PipelineLayout = text.parse().unwrap();
        assert_eq!(layout.to_string().parse(), Ok(layout));
    }

    #[test]
    fn repetitions_are_written_out_in_megatrons_order() {
        for (text, wanted) in [
            ("Et*3|(tt|)*2,m|L", "Ettt|tt|tt|m|L"),
            ("E,t,t,|,L", "Ett|L"),
            ("Et|*3L", "Et|||L"),
            ("(t*3|)*2L", "ttt|ttt|L"),
            ("(tt|)*2*3L", "tt|tt|||L"),
            ("E(t|t)*2L", "Et|tt|tL"),
            ("t*1,2L", "ttttttttttttL"),
            ("Et*0L", "EL"),
            ("E(t|)*0L", "EL"),
            ("Et*0002L", "EttL"),
            ("((t)*0L", "L"),
            ("", ""),
        ] {
            assert_eq!(written_out(text).unwrap().join("|"), wanted, "{text}");
        }
    }

    #[test]
    fn what_megatron_refuses_is_refused() {
        for (text, character) in [
            ("E t|L", ' '),
            ("E(tt|)L", '('),
            ("E((t|)*2)*2L", '('),
            ("E()*2L", '('),
            ("Et)*2L", ')'),
            ("t*2*3", '*'),
            ("t*", '*'),
            ("t*-1", '*'),
            ("*3", '*'),
            ("Ex|L", 'x'),
            ("3t", '3'),
        ] {
            match written_out(text) {
                Err(PipelineLayoutError::Character {
                    character: found, ..
                }) => assert_eq!(found, character, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_huge_repetition_is_refused_before_it_is_written_out() {
        for text in [
            "t*999999999",
            "(t|t|)*99999999999999999999999999",
            "(t*99999|)*99999",
            &"(t|)*9999".repeat(1000),
            &"t".repeat(MAX_CHARACTERS + 1),
        ] {
            let error = written_out(text).unwrap_err();
            assert!(
                matches!(error, PipelineLayoutError::TooLong { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn printing_repeats_stages_and_layers() {
        for (text, wanted) in [
            ("Ettt|tt|tt|tt|m|L", "Et*3|(tt|)*3m|L"),
            ("E||||L", "E||||L"),
            ("E|||||||L", "E|(|)*6L"),
            ("EtL", "EtL"),
        ] {
            let layout: PipelineLayout = text.parse().unwrap();
            assert_eq!(layout.to_string(), wanted);
            assert_eq!(wanted.parse::<PipelineLayout>().unwrap(), layout);
        }
    }

    #[test]
    fn lists_of_words_are_layouts_too() {
        let words = [
            vec!["Embedding", "decoder "],
            vec![],
            vec!["DECODER", "mtp", "loss"],
        ];
        let layout = PipelineLayout::from_words(&words).unwrap();
        assert_eq!(layout.to_string(), "Et||tmL");
        let error = PipelineLayout::from_words(&[vec!["encoder"]]).unwrap_err();
        assert!(
            error.to_string().contains("\"encoder\" in stage 0"),
            "{error}"
        );
    }

    #[test]
    fn a_layout_that_does_not_fit_the_model_says_why() {
        let check = |text: &str, pp, vpp, layers, mtp| {
            let layout: PipelineLayout = text.parse().unwrap();
            layout.check(pp, vpp, layers, mtp).unwrap_err().to_string()
        };
        for (found, wanted) in [
            (check("Et|t|L", 2, None, 2, 0), "has 3 stages"),
            (check("Et|tL", 2, Some(2), 2, 0), "conflicts with"),
            (check("tE|tL", 2, None, 2, 0), "must begin with embedding"),
            (check("Et|tLt", 2, None, 3, 0), "must end with loss"),
            (check("EtL|tL", 2, None, 2, 0), "it has 2"),
            (check("EEt|tL", 2, None, 2, 0), "it has 2"),
            (check("", 1, None, 2, 0), "must begin with embedding"),
            (
                check("Et|ttL", 2, None, 4, 0),
                "layers 3 in pipeline_model_parallel_layout must match num_layers 4",
            ),
            (
                check("Et|tmL", 2, None, 2, 0),
                "must match mtp_num_layers 0",
            ),
            (check("Et|mtL", 2, None, 2, 1), "stage 1 has one behind"),
            (check("Et|tm|mL", 3, None, 2, 2), "stage 1 is not"),
            (check("Et|tm||L", 2, None, 2, 1), "stage 1 is not"),
        ] {
            assert!(found.contains(wanted), "{found}");
        }
    }
}
