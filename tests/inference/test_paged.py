"""The page pool hands out no page twice, loses none, and wastes less than a page a request."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrecipes.errors import UserError
from mmrecipes.inference import PagePool

ACTIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 40)), max_size=60)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(actions=ACTIONS, pages=st.integers(1, 12), page_size=st.integers(1, 16))
def test_no_page_is_handed_out_twice(actions, pages, page_size):
    pool = PagePool(pages, page_size)
    for ends, request, tokens in actions:
        before = len(pool.free), dict(pool.lengths)
        if ends and request in pool.tables:
            pool.release(request)
        elif not ends and not pool.append(request, tokens):
            assert (len(pool.free), pool.lengths) == before  # refused: nothing changed
            assert tokens + pool.lengths.get(request, 0) > page_size * (len(pool.tables.get(request, [])) + len(pool.free))
        owned = [page for table in pool.tables.values() for page in table]
        assert sorted(owned + pool.free) == list(range(pages))
        for own, table in pool.tables.items():
            assert 0 <= len(table) * page_size - pool.lengths[own] < page_size
            places = {pool.place(own, position) for position in range(pool.lengths[own])}
            assert len(places) == pool.lengths[own] and {page for page, _ in places} == set(table)


def test_what_makes_no_sense_is_refused():
    pool = PagePool(2, 4)
    with pytest.raises(UserError, match="0 tokens"):
        pool.append("a", 0)
    with pytest.raises(UserError, match="no request 'a'"):
        pool.release("a")
