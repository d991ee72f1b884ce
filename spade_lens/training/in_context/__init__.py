"""Regression in context through a fixed representation, and small transformers that learn it.

Source: Guo et al., "How do transformers learn in-context beyond simple functions? A case study on
learning with representations" (arXiv 2310.10616). A label is linear in a representation Phi of its
input. Phi is the same in all prompts, the weights of the linear part are new in every prompt. The
best that can be done is known in closed form: ridge regression on Phi.

What is here knows no plots and no studies.
"""
