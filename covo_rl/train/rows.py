"""The training rows as one rank sees them: which come next, its share, their prompts, and those without one."""

from __future__ import annotations

from collections.abc import Sequence

from covo_rl.audio import AudioError, ClipStore
from covo_rl.config import Options
from covo_rl.models.base import AudioFamily
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.train.guard import TrainingStopped
from covo_rl.train.ranks import Ranks
from covo_rl.train.sampler import PromptSampler, share
from covo_rl.types import Example, Prompt, visible


class TrainingRows:
    """`sampler` says which rows come next, for all ranks; `skipped` rows, by id, why they have no prompt."""

    def __init__(
        self, examples: Sequence[Example], options: Options, family: AudioFamily, clips: ClipStore, ranks: Ranks
    ) -> None:
        self.options, self.family, self.clips, self.ranks = options, family, clips, ranks
        self.sampler = PromptSampler(examples, options.train.seed)
        self.by_id = {row.id: row for row in examples}
        self.skipped: dict[str, str] = {}

    def share(self, rows: Sequence) -> list:
        """This rank's of the rows of a step."""
        return share(rows, self.ranks.rank, self.ranks.world)

    def following(self, step: int) -> list[Example]:
        """This rank's rows after those of `step`, if no group is sampled again."""
        more = step + 1 < self.options.train.max_steps
        return self.share(self.sampler.peek(self.options.train.prompts_per_step) if more else [])

    def prompt(self, row: Example) -> Prompt:
        return build_prompt(row, self.family, self.clips, self.options.prompt)

    def prompts(self, rows: Sequence[Example], step: int) -> list[Prompt]:
        """Of the rows whose audio can be read; the others are counted over all ranks.

        Raises:
            TrainingStopped: they are more than `skipped_rows_limit` allows.
        """
        prompts = []
        for row in rows:
            try:
                prompts.append(self.prompt(row))
            except (AudioError, PromptError) as error:
                self.skipped[row.id] = str(error)
        for part in self.ranks.gathered(dict(self.skipped)):
            self.skipped |= part
        limit, total = self.options.data.skipped_rows_limit, len(self.sampler.examples)
        if len(self.skipped) > limit * total:
            reasons = "; ".join(f"row {visible(name)}: {why}" for name, why in list(self.skipped.items())[:5])
            raise TrainingStopped(
                f"step {step}: {len(self.skipped)} of {total} rows were skipped because their audio "
                f"could not be read, above skipped_rows_limit {limit}. The first: {reasons}"
            )
        return prompts
