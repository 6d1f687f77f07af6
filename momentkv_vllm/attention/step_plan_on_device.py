"""Work lists of decode steps on a GPU, in persistent buffers, for CUDA graphs (triton_kernels/plan.py fills them)."""

import torch

from momentkv_vllm.attention.step_plan import StepPlan
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.kernels.worklists import AttendWork, RetireWork, Round, mapped
from momentkv_vllm.page_schedule import PageSchedule
from momentkv_vllm.policies import Policy


class DecodePlanner:
    """Steps with one query a request. Every request is in the lists, also below its budget: the graph is one for all.

    Only for "chunked" prefill: in "full" mode a prompt's last step may retire any number of pages. A prompt's last token may
    come alone, and then retires what the grain of prompts left to it.
    """

    def __init__(
        self,
        schedule: PageSchedule,
        config: EvictionConfig,
        policy: type[Policy],
        max_rows: int,
        device: torch.device | str,
    ) -> None:
        self.schedule = schedule
        self.observed = config.observation_tokens if policy.observes else 0
        self.observe_all = policy.observes_every_query()
        record = schedule.record_pages

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(max_rows, *shape, dtype=dtype, device=device)

        self.no_prompts = buffer(dtype=torch.int32)
        self.attend = AttendWork(
            first_token=buffer(),
            num_queries=buffer(),
            pages=buffer(schedule.reading_pages),
            last_slot=buffer(),
            moment_pages=buffer(record.stop - record.start),
            num_evicted=buffer(dtype=torch.float32),
            observe_from=buffer(),
            restart=buffer(dtype=torch.bool),
            most_queries=1,
            stored=buffer() if schedule.is_packed else None,
            store_pages=schedule.store_pages,
        )
        self.retire = RetireWork(
            store_pages=buffer(schedule.store_pages),
            retiring_pages=buffer(schedule.most_retired_pages) - 1,
            moment_pages=self.attend.moment_pages,
            num_evicted=self.attend.num_evicted,
            run_tokens=schedule.run_tokens,
            stored=self.attend.stored,
            store_tokens=schedule.store_tokens,
            first_tokens=schedule.first_retired_tokens,
            due=torch.zeros(1 + max_rows, dtype=torch.int64, device=device),
        )

    def update(
        self,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        block_table: torch.Tensor,
        prompts: torch.Tensor | None = None,
    ) -> StepPlan:
        """Plan a step. The lists of equal numbers of rows lie at equal addresses in every step.

        Args:
            seq_lens: [rows] int32 committed tokens at the end of the step, 0 for padding.
            query_start: [rows + 1] int32; every row has one query, padding none.
            block_table: [rows, columns] int32.
            prompts: [rows] int32 lengths of prompts; read where the schedule `reads_prompt_lengths`, None: all are over.
        """
        # Imported late: on a machine without Triton this module is still read.
        from momentkv_vllm.triton_kernels.plan import plan

        rows = len(seq_lens)
        attend, retire = (mapped(work, lambda _, x: x[:rows]) for work in (self.attend, self.retire))
        retire.due = self.retire.due
        prompts = self.no_prompts[:rows] if prompts is None else prompts
        given = seq_lens, query_start, block_table, prompts
        plan(*given, attend, retire, self.schedule, self.observed, self.observe_all)
        if not self.observed:
            attend.observe_from = attend.restart = None
        return StepPlan([], [Round([attend], [retire])])
