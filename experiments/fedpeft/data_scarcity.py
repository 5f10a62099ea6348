"""FedPEFT, data scarcity: 1,000, 1,500 and 2,000 training examples in all.

Command:  python experiments/fedpeft/data_scarcity.py --small
          python experiments/fedpeft/data_scarcity.py --full --plan        (expected accelerator-hours, nothing else)
"""

import cells

SMALL = FULL = {f"{n:,} examples": {"examples": n} for n in (1000, 1500, 2000)}

if __name__ == "__main__":
    cells.main("data_scarcity", SMALL, FULL, __doc__)
