"""What must hold between two steps in the block manager's books. The tests' engine asks after every step, a server never does."""

from collections.abc import Mapping

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from momentkv_vllm.block_manager.class_books import ClassBooks


class ChecksIntegrity:
    """For the block manager (manager.py), whose fields it reads."""

    def check_integrity(self, other_pages: int = 0, requests: Mapping[str, Request] | None = None) -> None:
        """Assert the bookkeeping between two steps. Raises AssertionError naming the request and the numbers.

        Args:
            other_pages: pages of the pool that layers without eviction own.
            requests: the scheduler's, whose schedule is compared with what was retired.
        """
        for request in (requests or {}).values():
            self._check_schedule(request)
        owners: dict[int, int] = {}
        for request_id, blocks in self.req_to_blocks.items():
            for block in blocks:
                if not block.is_null:
                    owners[block.block_id] = owners.get(block.block_id, 0) + 1
            self._check_request(request_id, blocks)
        for number, count in owners.items():
            found = self.block_pool.blocks[number].ref_cnt
            assert found == count, f"page {number} has {count} owners, but is referenced {found} times"
        for books in self.books:
            if books.states:
                books.states.check_integrity(set(owners))
        free = self.block_pool.get_num_free_blocks()
        total = self.block_pool.num_gpu_blocks - 1
        assert len(owners) + other_pages + free == total, (
            f"{len(owners)} owned + {other_pages} of other layers + {free} free pages != {total}"
        )
        for books in self.books:
            self._check_books(books)

    def _check_books(self, books: ClassBooks) -> None:
        """A class's sums are those of its requests."""
        columns = sum(len(row) for name, row in self.req_to_blocks.items() if self.of(name) is books)
        counted = books.live + books.retired
        assert columns == counted, f"stock would hold {columns} pages, the metrics say {counted}"
        evicting = [boundary for name, boundary in self.evicting.items() if self.of(name) is books]
        evicted = sum(map(books.schedule.evicted_tokens, evicting))
        assert evicted == books.evicted, f"{evicted} tokens are evicted, the metrics say {books.evicted}"
        sequences = sum(self.of(name) is books for name in self.live_pages)
        found, counted = (sequences, len(evicting)), (books.sequences, books.evicting)
        assert found == counted, f"{found} sequences own pages and evict, the metrics say {counted}"

    def _check_schedule(self, request: Request) -> None:
        """What was retired, the schedule must have retired too: a prompt that grew would move it back in `full` prefill."""
        retired = self.evicting.get(request.request_id, 0)
        schedule = self.of(request.request_id).schedule
        scheduled = schedule.boundary_column(request.num_computed_tokens, request.num_prompt_tokens)
        assert retired <= scheduled, (
            f"{request.request_id}: retired up to column {retired}, but the schedule says {scheduled} at "
            f"{request.num_computed_tokens} tokens of a prompt of {request.num_prompt_tokens}"
        )

    def _check_request(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        books = self.of(request_id)
        boundary = books.blocks.retired(self.evicting.get(request_id, 0))
        sealed = request_id in self.prefixes and self.prefixes[request_id].sealed
        assert not boundary or not self.enable_caching or sealed, f"{request_id} evicts unsealed"
        for column, block in enumerate(blocks):
            rewritten = column < books.rewritten
            retired = not rewritten and column < boundary
            assert block.is_null == retired, f"{request_id}: column {column} null={block.is_null}, boundary {boundary}"
            if column < books.private and not retired:
                assert block.ref_cnt == 1, f"{request_id}: page {column} has {block.ref_cnt} owners"
            if rewritten:
                assert block.block_hash is None or not sealed, (
                    f"{request_id}: page {column} may be rewritten and is cached"
                )
        live = sum(not b.is_null for b in blocks)
        assert live == self.live_pages.get(request_id, 0), f"{request_id}: {live} live pages, counted otherwise"
        cap = books.admission
        assert cap is None or live <= cap, f"{request_id}: {live} live pages exceed the admission bound {cap}"
