"""FedPEFT, data distribution: the same examples spread evenly over the clients, and by Dirichlet(0.1) over the labels.

Command:  python experiments/fedpeft/data_distribution.py --small
          python experiments/fedpeft/data_distribution.py --full --plan    (expected accelerator-hours, nothing else)
"""

import cells

SMALL = FULL = {"iid": {"partition": "iid"}, "Dirichlet 0.1": {}}

if __name__ == "__main__":
    cells.main("data_distribution", SMALL, FULL, __doc__)
