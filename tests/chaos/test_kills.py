"""Every long command, killed at random moments: nothing is lost, nothing is half, and the next run ends as if nothing
had been.
"""

import pytest
from chaos import COMMANDS, Place, killed_again_and_again, prepared


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_twenty_random_moments(place: Place, name: str) -> None:
    seconds = killed_again_and_again(place, COMMANDS[name], place.root / name, kills=20, seed=11)
    print(f"{name}: 20 kills within {seconds:.1f} s")


@pytest.mark.parametrize("name", ["prepare", "export"])
def test_killed_twice(place: Place, name: str) -> None:
    killed_again_and_again(place, COMMANDS[name], place.root / f"{name}-twice", kills=2, seed=1)
