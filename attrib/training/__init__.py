"""Training of small nets: ``recipe.train`` from a configuration, ``loop.fit`` from objects.

``data`` chooses the samples and ``batches`` loads and orders them, ``state`` keeps what a resumed training needs,
``loop`` adapts mmengine's, ``record`` says in a training's folder what it is, ``recipe`` reads the configuration.
"""
