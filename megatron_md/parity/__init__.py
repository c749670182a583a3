"""The k-parity path: a task whose answer is known, through the trainer, objectives and schedules that train 8B.

The label of n random bits is the parity of k secret ones (Huang and Mirzasoleiman, arXiv 2601.22450). Which masks help
to find them is known in closed form (`megatron_md.diffusion.theory`), so one command shows whether theory and
training agree, and whether a machine's numbers are right.
"""
