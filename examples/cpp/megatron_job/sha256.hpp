// SHA-256 (FIPS 180-4), to compare tensors with a list.
#pragma once

#include <cstddef>
#include <string>

/// 64 hexadecimal digits.
std::string sha256(const void* data, std::size_t bytes);
