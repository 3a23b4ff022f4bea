"""What a sequence takes of the tokens that a step drew for it, and where it ends."""

from dsv3_jax.serving.sequence import Drawn, Progress, Sequence


def accept(sequence: Sequence, drawn: Drawn) -> Progress:
    """Puts tokens behind the sequence until one ends it: a stop id after `min_tokens`, or the last of `max_tokens`.

    Its tokens must be computed up to there; a sequence that wants none ends with its prompt.
    """
    reason, count = None, 0
    if not sequence.max_tokens and sequence.num_computed >= len(sequence.prompt):
        reason = "length"
    for token in drawn.tokens:
        if reason is not None:
            break
        may_stop = sequence.num_generated >= sequence.params.min_tokens
        sequence.tokens.append(token)
        count += 1
        if may_stop and token in sequence.stop_ids:
            reason = "stop"
        elif sequence.num_generated >= sequence.max_tokens:
            reason = "length"
    logprobs = None if drawn.logprobs is None else drawn.logprobs[:count]
    return Progress(sequence, Drawn(drawn.tokens[:count], logprobs, drawn.prompt_logprobs), reason)


def without_known(drawn: Drawn, *, start: int, num_known: int) -> Drawn:
    """Leaves out log-probabilities of the prompt's first `num_known` tokens behind its first, which were given before.

    Those of `drawn` begin with token start + 1; a prompt that is computed again gives them again.
    """
    if drawn.prompt_logprobs is None:
        return drawn
    return drawn._replace(prompt_logprobs=drawn.prompt_logprobs[max(num_known - start, 0) :])
