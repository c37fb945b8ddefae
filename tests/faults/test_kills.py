"""Two of the random kills of `kills.py`, at other moments in each run; the seed is printed."""

import random

from tests.faults.kills import killed_and_whole


def test_trainings_killed_at_random_moments_end_in_the_same_weights(tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    assert killed_and_whole(tmp_path, num_kills=2, num_processes=1, seed=seed)[1] == []
