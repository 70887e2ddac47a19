"""Fashion-MNIST: 70,000 pictures of clothes in the form of MNIST (Xiao, Rasul and Vollgraf 2017).

https://arxiv.org/abs/1708.07747, https://github.com/zalandoresearch/fashion-mnist. Sizes and hashes as in the
checksums of TensorFlow Datasets.
"""

from __future__ import annotations

from pipeline.raw.idx_source import idx_source

SOURCE = idx_source(
    name="fashionmnist",
    description="Fashion-MNIST, clothes, 28x28 gray",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    files=(
        (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
)
