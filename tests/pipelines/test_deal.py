"""Units of work on their way to the workers."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.fuse import FuseWork
from fusion_core.unit import Work
from pipelines import deal
from schemas.feature_table import ManifestRecord, Part
from schemas.samples import InputIdentity, Unit

identities = st.builds(InputIdentity, st.integers(0, 2**62), st.integers(0, 2**62), st.text(max_size=8))
names = st.from_regex(r"[\w-][\w.-]{0,8}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
parts = st.builds(Part, names, st.integers(0, 2**40), st.integers(0, 2**40), digests)
units = st.builds(Unit, names, st.just("tar"), st.text(), identities)
records = st.builds(
    ManifestRecord,
    unit=units,
    spec_fingerprint=st.text(max_size=4),
    rows_in=st.integers(0, 2**40),
    rows_out=st.integers(0, 2**40),
    rows_dead=st.integers(0, 2**40),
    revision=st.integers(0, 2**40),
    features=st.none() | parts,
    opted_out=st.binary(max_size=64),
)
works = st.builds(
    Work,
    units,
    st.none() | records,
    st.lists(st.text(max_size=9), max_size=2).map(tuple),
    st.dictionaries(st.integers(0, 2**40), st.text(max_size=9), max_size=2),
)


@given(st.lists(works, max_size=30), st.integers(1, 40))
def test_every_unit_comes_once_and_as_it_was(items: list[Work], packs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deal, "_PACKS", packs)
        packed = deal.pack(items)
    dealt = [list(deal.unpack(data, Work)) for data in packed]
    assert len(dealt) == min(packs, len(items))
    assert all(max(map(len, dealt)) - len(pack) <= 1 for pack in dealt), "as long as one another"
    assert [pack[0] for pack in dealt] == items[: len(dealt)], "the big ones first"
    whole = [pack[turn] for turn in range(max(map(len, dealt), default=0)) for pack in dealt if turn < len(pack)]
    assert whole == items


@given(st.lists(st.builds(FuseWork, records, works), max_size=3))
def test_units_to_fuse_too(items: list[FuseWork]) -> None:
    assert [item for data in deal.pack(items) for item in deal.unpack(data, FuseWork)] == items


def test_a_pack_of_something_else_is_refused() -> None:
    (packed,) = deal.pack([{"unit": 1}])
    with pytest.raises(msgspec.ValidationError):
        list(deal.unpack(packed, Work))
