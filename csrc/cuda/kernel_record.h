// Which kernel each op launched last, so that tests can prove that the one meant is the one that ran.
#pragma once

#include <map>
#include <string>

namespace mxmoe {
namespace cuda {

void record_kernel(const char* op, const char* kernel);
std::map<std::string, std::string> last_kernels();

}  // namespace cuda
}  // namespace mxmoe
