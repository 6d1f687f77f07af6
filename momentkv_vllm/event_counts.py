"""At which token counts a sequence evicts: a pure function of how many are committed and of how long its prompt is.

    first_event_tokens                                    catch-up event, the last count of the finer grain in the prompt
        |--- prefill_retire_tokens ---|--- ... ---|--- ... |- retire_tokens -|- retire_tokens -|- ...
                                                          prompt's end ^

A prompt that is exact has its first event at its end, or where the budget is full after it.
"""

from collections.abc import Iterator


class EventCounts:
    """For PageSchedule (page_schedule.py), whose numbers it reads."""

    first_event_tokens: int
    retire_tokens: int
    prefill_retire_tokens: int
    exact_prompt_tokens: int

    @property
    def reads_prompt_lengths(self) -> bool:
        """Whether events depend on how long a request's prompt is."""
        return self.exact_prompt_tokens > 0 or self.prefill_retire_tokens > self.retire_tokens

    def events(self, start: int, end: int, prompt_tokens: int = 0) -> Iterator[int]:
        """Token counts e in (start, end] at which an eviction event happens, ascending."""
        event = self.next_event(start, prompt_tokens)
        while event <= end:
            yield event
            event = self.next_event(event, prompt_tokens)

    def next_event(self, committed_tokens: int, prompt_tokens: int = 0) -> int:
        """The first event after `committed_tokens`."""
        first = self.first_event_of(prompt_tokens)
        if committed_tokens < first:
            return first
        caught_up = self.catch_up_event(prompt_tokens)
        if committed_tokens < caught_up:
            grain = self.prefill_retire_tokens
            return min(caught_up, self._on_grid(committed_tokens, grain) + grain)
        return self._on_grid(committed_tokens, self.retire_tokens) + self.retire_tokens

    def last_event(self, committed_tokens: int, prompt_tokens: int = 0) -> int:
        """The latest event at or before `committed_tokens`; 0 if none yet."""
        first = self.first_event_of(prompt_tokens)
        if committed_tokens < first:
            return 0
        reads = committed_tokens < self.catch_up_event(prompt_tokens)
        return max(first, self._on_grid(committed_tokens, self.prefill_retire_tokens if reads else self.retire_tokens))

    def catch_up_event(self, prompt_tokens: int) -> int:
        """From this count on events are `retire_tokens` apart, before it `prefill_retire_tokens`: the last event of the finer
        grain that the prompt reaches. 0 where there is one grain."""
        if self.prefill_retire_tokens == self.retire_tokens:
            return 0
        first = self.first_event_of(prompt_tokens)
        return max(first, self._on_grid(prompt_tokens, self.retire_tokens))

    def last_common_event(self, committed_tokens: int, prompt_tokens: int) -> int:
        """The latest event at or before `committed_tokens` to which every longer prompt comes by the same events; 0 if none.

        Not for prompts that are exact."""
        caught_up = self.catch_up_event(prompt_tokens) or committed_tokens
        common = min(committed_tokens, caught_up)
        return 0 if common < self.first_event_tokens else self._on_grid(common, self.prefill_retire_tokens)

    def _on_grid(self, committed_tokens: int, grain: int) -> int:
        """The latest first_event_tokens + i * grain at or before `committed_tokens`."""
        return committed_tokens - (committed_tokens - self.first_event_tokens) % grain

    def first_event_of(self, prompt_tokens: int) -> int:
        """Committed tokens at which a request with such a prompt evicts first. It decides all of its events."""
        exact = prompt_tokens <= self.exact_prompt_tokens
        return max(self.first_event_tokens, prompt_tokens) if exact else self.first_event_tokens
