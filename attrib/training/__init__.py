"""Training of small nets: ``recipe.train`` from a configuration, ``loop.fit`` from objects.

``batches`` knows the samples and their order, ``state`` what a resumed training needs, ``loop`` mmengine,
``record`` what a training's folder says about it, ``recipe`` the configuration.
"""
