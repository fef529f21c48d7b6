"""What is known to be weak in a run's model, and what nobody has looked at."""

from __future__ import annotations

from recipe.report.record import Record
from recipe.report.summary import initial_weights, per_parameter

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022


def limitations(record: Record) -> list[str]:
    """A sentence or two for each."""
    config, ratio = record.config, round(record.tokens / record.plan.parameters, 1)
    found = []
    if not record.is_finished:
        found.append(
            f"The run is not finished: {record.updates:,} of {record.plan.planned_updates:,} updates are done."
        )
    elif record.plan.planned_updates < record.plan.total_updates:
        found.append(
            f"The run was stopped after {record.updates:,} of the {record.plan.total_updates:,} updates that its learning "
            "rate was laid out for."
        )
    few = "not fewer"
    if ratio < TOKENS_PER_PARAMETER:
        few = "far fewer" if ratio < TOKENS_PER_PARAMETER / 4 else "fewer"
    if base := initial_weights(config):
        found.append(f"What {base} had been trained on before, and its own limitations, are not in this card.")
    else:
        found.append(
            f"It has seen {per_parameter(record)} tokens per parameter, {few} than the {TOKENS_PER_PARAMETER} that were found "
            "to use a given amount of compute best (Hoffmann et al., 2022)."
        )
    found.append(
        "It continues text. It was not trained to follow instructions, to answer questions or to refuse, and what it writes "
        "may be false, offensive or copied from its text."
    )
    found.append(f"It sees at most {config.n_positions:,} tokens at once.")
    found.append(
        "Nobody has examined its text for this card: which languages it is in, whom it represents, which personal data or "
        "licences it holds. No licence is stated for the model: choose one that the text allows."
    )
    if record.last("validation_loss"):
        found.append(
            "The evaluation is the loss on held-out documents of the same source: it says nothing of other text or of tasks, "
            "and near-duplicates of these documents may have been trained on."
        )
    else:
        found.append("It was not evaluated on text that it was not trained on.")
    if skipped := record.events_called("skipped_update"):
        found.append(
            f"{len(skipped):,} update{'s' if len(skipped) > 1 else ''} gave a loss or gradient that was not finite and "
            f"{'were' if len(skipped) > 1 else 'was'} skipped: their text was read, but not learnt from."
        )
    if rollbacks := record.events_called("rollback"):
        found.append(
            f"After a spike of the loss or the gradient it returned to a checkpoint ({len(rollbacks):,} x), and left out the "
            "text that had led there."
        )
    if config.model.dropout:
        found.append(
            "It was trained with dropout, which is the one thing that depends on the ranks and the micro-batch."
        )
    return found
