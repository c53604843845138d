"""One algorithm, one LightningModule, one short file; ``base.py`` holds the loop they share."""

from rllava_pl.modules.base import RLModule
from rllava_pl.modules.chord import CHORD
from rllava_pl.modules.cispo import CISPO
from rllava_pl.modules.clip_cov import ClipCov
from rllava_pl.modules.dapo import DAPO
from rllava_pl.modules.dpo import DPO
from rllava_pl.modules.dr_grpo import DrGRPO
from rllava_pl.modules.gmpo import GMPO
from rllava_pl.modules.gpg import GPG
from rllava_pl.modules.grpo import GRPO
from rllava_pl.modules.gspo import GSPO
from rllava_pl.modules.hpt import HPT
from rllava_pl.modules.kl_cov import KLCov
from rllava_pl.modules.luffy import LUFFY
from rllava_pl.modules.opo import OPO
from rllava_pl.modules.pass_at_k import PassAtK
from rllava_pl.modules.policy_module import PolicyModule
from rllava_pl.modules.ppo import PPO
from rllava_pl.modules.recipe import Recipe
from rllava_pl.modules.reinforce_pp import ReinforcePP
from rllava_pl.modules.reinforce_pp_baseline import ReinforcePPBaseline
from rllava_pl.modules.remax import ReMax
from rllava_pl.modules.rloo import RLOO
from rllava_pl.modules.sapo import SAPO
from rllava_pl.modules.sft import SFT
from rllava_pl.modules.srft import SRFT
from rllava_pl.modules.uft import UFT

__all__ = [
    "CHORD",
    "CISPO",
    "DAPO",
    "DPO",
    "GMPO",
    "GPG",
    "GRPO",
    "GSPO",
    "HPT",
    "LUFFY",
    "OPO",
    "PPO",
    "RLOO",
    "SAPO",
    "SFT",
    "SRFT",
    "UFT",
    "ClipCov",
    "DrGRPO",
    "KLCov",
    "PassAtK",
    "PolicyModule",
    "RLModule",
    "ReMax",
    "Recipe",
    "ReinforcePP",
    "ReinforcePPBaseline",
]
