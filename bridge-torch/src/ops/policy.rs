//! Which implementation of each op runs.

use std::fmt;

/// Who computes the ops of a model; decided when the model is built, and printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelPolicy {
    /// The fastest implementation that this build has for the device.
    #[default]
    Auto,
    /// CUDA kernels; refused by a build without them.
    Cuda,
    /// libtorch everywhere.
    Reference,
}

/// Why a policy cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// CUDA kernels were demanded of a build that has none.
    #[error(
        "kernels `cuda` were asked for, but this build has no CUDA kernels; use `auto` or `reference`, which run on libtorch"
    )]
    NoCudaKernels,
    /// Not the name of a policy.
    #[error("`{name}` names no kernels; choose `auto`, `cuda` or `reference`")]
    Unknown {
        /// What was given.
        name: String,
    },
}

/// The implementation of one op.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Implementation {
    /// The op's file in `ops`.
    pub op: &'static str,
    /// How it is computed.
    pub by: &'static str,
}

const LIBTORCH: [Implementation; 9] = [
    Implementation {
        op: "attention",
        by: "libtorch",
    },
    Implementation {
        op: "conv1d",
        by: "libtorch",
    },
    Implementation {
        op: "delta_rule",
        by: "libtorch, chunks of up to 64, gradient by hand",
    },
    Implementation {
        op: "gdn",
        by: "libtorch, one autograd node, gradient by hand",
    },
    Implementation {
        op: "linear_cross_entropy",
        by: "libtorch, row blocks",
    },
    Implementation {
        op: "moe",
        by: "libtorch, one product an expert",
    },
    Implementation {
        op: "norm",
        by: "libtorch, gradient by hand",
    },
    Implementation {
        op: "rotary",
        by: "libtorch",
    },
    Implementation {
        op: "swiglu",
        by: "libtorch, gradient by hand",
    },
];

impl KernelPolicy {
    /// The implementation of every op under this policy.
    ///
    /// # Errors
    /// [`PolicyError::NoCudaKernels`] when the policy demands what this build lacks.
    pub fn describe(self) -> Result<Vec<Implementation>, PolicyError> {
        match self {
            Self::Cuda => Err(PolicyError::NoCudaKernels),
            Self::Auto | Self::Reference => Ok(LIBTORCH.to_vec()),
        }
    }
}

impl std::str::FromStr for KernelPolicy {
    type Err = PolicyError;

    fn from_str(name: &str) -> Result<Self, PolicyError> {
        match name {
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda),
            "reference" => Ok(Self::Reference),
            _ => Err(PolicyError::Unknown {
                name: name.to_owned(),
            }),
        }
    }
}

impl fmt::Display for KernelPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cuda => "cuda",
            Self::Reference => "reference",
        })
    }
}
