"""What loading the data did, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Report:
    """What happened on the way, in numbers; `lines()` says it to people."""

    formats: dict[str, str] = field(
        default_factory=dict
    )  # --data -> format, and if it is templated
    rows: int = 0
    examples: int = 0  # after data weights
    tokens: int = 0
    labels: int = 0
    truncated: int = 0  # sequences longer than max_length, the dropped ones among them
    dropped: list[str] = field(default_factory=list)  # where
    straddled: int = 0  # tokens
    split: int = 0  # conversations
    unseen_reasoning: int = 0  # conversations
    unseen_tools: int = 0  # conversations
    no_eos: bool = False

    def add(self, examples: int, tokens: int, labels: int) -> None:
        """Counts these as well, after data weights."""
        self.examples += examples
        self.tokens += tokens
        self.labels += labels

    def format_lines(self) -> list[str]:
        """What each --data was taken for, as far as they were read."""
        return [f"{data}: format {name}" for data, name in self.formats.items()]

    def lines(self) -> list[str]:
        """A few lines for a terminal: always the totals, the rest where it happened."""
        lines = self.format_lines()
        lines.append(
            f"{self.rows:,} rows -> {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.labels:,} of them labels"
        )
        if self.truncated:
            lines.append(f"{self.truncated:,} sequences longer than --max-length were cut")
        if self.dropped:
            lines.append(
                f"{len(self.dropped):,} dropped, since the cut left no label: {some(self.dropped)}"
            )
        if self.straddled:
            lines.append(
                f"{self.straddled:,} tokens straddle the edge of what is trained, and are no labels"
            )
        if self.split:
            lines.append(
                f"{self.split:,} conversations were split into one example per trained turn, "
                "because the chat template renders earlier turns differently later on"
            )
        if self.unseen_reasoning:
            lines.append(
                f"{self.unseen_reasoning:,} conversations have reasoning that the chat template "
                "does not render"
            )
        if self.unseen_tools:
            lines.append(
                f"{self.unseen_tools:,} conversations have tools that the chat template does not "
                "render"
            )
        if self.no_eos:
            lines.append("the tokenizer has no EOS token, so none ends the examples")
        return lines


def some(places: Sequence[str]) -> str:
    """The first places, and that there are more."""
    return ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
