"""The house holds: arrows run down, no circles, no file too long, a short front door."""

import house
import pytest

MOST_LINES = 400
MOST_OF_THE_HOUSE = 0.22
MOST_NAMES = 137
MOST_NAMES_AT_THE_TOP = 24
MOST_WIDE_FUNCTIONS = 16


def test_every_room_has_a_floor():
    rooms = {house.room(module) for module in house.files()} - {"the roof"}
    assert rooms == {name for names in house.FLOORS for name in names}


def test_no_arrow_runs_up():
    up = {
        pair: files
        for pair, files in house.room_arrows().items()
        if house.floor(pair[0]) < house.floor(pair[1])
    }
    assert not up


def test_no_circle_of_rooms():
    assert not house.circles(set(house.room_arrows()))


def test_no_circle_of_files():
    # A package's __init__ hands on names of its modules, and they never ask it for any.
    assert not house.circles(set(house.arrows()))


def test_no_file_is_too_long():
    assert not {m: n for m in house.files() if (n := house.lines(m)) > MOST_LINES}


def test_no_room_is_most_of_the_house():
    rooms: dict[str, int] = {}
    for module in house.files():
        rooms[house.room(module)] = rooms.get(house.room(module), 0) + house.lines(module)
    total = sum(rooms.values())
    assert not {name: n / total for name, n in rooms.items() if n / total > MOST_OF_THE_HOUSE}


def test_a_short_front_door():
    packages = [
        m for m, path in house.files().items() if path.name == "__init__.py" and m != house.PACKAGE
    ]
    assert sum(len(house.exports(m)) for m in packages) <= MOST_NAMES
    top = [n for n in house.exports(house.PACKAGE) if f"{house.PACKAGE}.{n}" not in house.files()]
    assert len(top) <= MOST_NAMES_AT_THE_TOP


def test_few_functions_are_wide():
    assert len(house.parameters(8)) <= MOST_WIDE_FUNCTIONS, house.parameters(8)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({("a", "b"), ("b", "c")}, []),
        ({("a", "b"), ("b", "a"), ("b", "c")}, [["a", "b"]]),
        ({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")}, [["a", "b", "c"]]),
    ],
)
def test_circles_are_found(pairs, expected):
    assert house.circles(pairs) == expected
