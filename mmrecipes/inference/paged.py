"""The KV cache of many requests in pages of one pool (PagedAttention, arXiv:2309.06180): only who owns which page, no tensors.
Built by hand in notebook 16."""

from mmrecipes.errors import UserError


class PagePool:
    """`pages` of `page_size` tokens each. `tables` {request: its pages, in order}, `lengths` {request: its tokens}."""

    def __init__(self, pages: int, page_size: int):
        self.page_size, self.free = page_size, list(range(pages))[::-1]
        self.tables: dict[object, list[int]] = {}
        self.lengths: dict[object, int] = {}

    def append(self, request: object, tokens: int = 1) -> bool:
        """Room for so many more tokens of a request, new or known; False, and nothing changed, where the pool lacks it."""
        if tokens < 1:
            raise UserError(f"append: {tokens} tokens; expected 1 or more")
        length, table = self.lengths.get(request, 0) + tokens, self.tables.get(request, [])
        missing = -(-length // self.page_size) - len(table)
        if missing > len(self.free):
            return False
        self.tables[request] = table + [self.free.pop() for _ in range(missing)]
        self.lengths[request] = length
        return True

    def release(self, request: object) -> None:
        """All pages of a request that has ended; UserError for one that has none."""
        if request not in self.tables:
            raise UserError(f"release: no request {request!r}")
        self.free += self.tables.pop(request)
        del self.lengths[request]

    def place(self, request: object, position: int) -> tuple[int, int]:
        """(page, offset in it) of a token."""
        return self.tables[request][position // self.page_size], position % self.page_size
