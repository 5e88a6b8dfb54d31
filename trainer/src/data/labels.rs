//! Which bytes of a rendered conversation the model is trained to write.

use std::ops::Range;

use super::error::RowError;

const ASSISTANT_HEADER: &str = "<|im_start|>assistant\n";
const TURN_END: &str = "<|im_end|>";
/// Written by the template and by the prompt without thinking, never by the model.
const EMPTY_THINKING: &str = "<think>\n\n</think>\n\n";

/// The supervised ranges of `text`: for each assistant message that counts, what follows its header (and an empty
/// thinking block) up to and with the end marker.
///
/// # Errors
/// [`RowError::AssistantTurns`] when the text has fewer assistant turns than `assistant_loss` has entries.
pub(crate) fn supervised_ranges(
    text: &str,
    assistant_loss: &[bool],
) -> Result<Vec<Range<usize>>, RowError> {
    let mut ranges = Vec::new();
    let mut from = 0;
    for (index, &counts) in assistant_loss.iter().enumerate() {
        let Some(header) = text[from..].find(ASSISTANT_HEADER) else {
            return Err(RowError::AssistantTurns {
                found: index,
                expected: assistant_loss.len(),
            });
        };
        let mut start = from + header + ASSISTANT_HEADER.len();
        if text[start..].starts_with(EMPTY_THINKING) {
            start += EMPTY_THINKING.len();
        }
        let end = text[start..]
            .find(TURN_END)
            .map_or(text.len(), |end| start + end + TURN_END.len());
        if counts {
            ranges.push(start..end);
        }
        from = end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n\
        <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think>\nt\n</think>\n\nb<|im_end|>\n";

    #[test]
    fn answers_count_with_their_reasoning_and_end_but_not_an_empty_thinking_block() {
        let ranges = supervised_ranges(TEXT, &[true, true]).unwrap();
        let texts: Vec<&str> = ranges.into_iter().map(|range| &TEXT[range]).collect();
        assert_eq!(
            texts,
            ["a<|im_end|>", "<think>\nt\n</think>\n\nb<|im_end|>"]
        );
    }

    #[test]
    fn a_turn_without_loss_is_passed_over() {
        let ranges = supervised_ranges(TEXT, &[false, true]).unwrap();
        assert_eq!(ranges.len(), 1);
        assert!(TEXT[ranges[0].clone()].starts_with("<think>\nt"));
    }

    #[test]
    fn a_missing_turn_is_an_error() {
        let error = supervised_ranges(TEXT, &[true; 3]).unwrap_err();
        assert!(matches!(
            error,
            RowError::AssistantTurns {
                found: 2,
                expected: 3
            }
        ));
    }
}
