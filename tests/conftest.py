import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # fbgemm stalls when its threads contend for cores

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("embtab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("embtab")
