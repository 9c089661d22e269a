// What the C functions share: descriptions to Tensors, and exceptions to a status and a sentence.
#pragma once

#include <exception>
#include <new>
#include <system_error>

#include "core/check.h"
#include "core/float_environment.h"
#include "core/types.h"
#include "mxmoe.h"

namespace mxmoe::capi {

// Keeps the sentence for mxmoe_last_error and returns the status.
int fail(int status, const char* sentence) noexcept;

// Runs the body of a C function; whatever it throws ends here, and the caller's floating-point settings stay outside.
template <typename Body>
int guarded(const Body& body) noexcept {
  const DefaultFloatEnvironment environment;
  try {
    body();
    return MXMOE_OK;
  } catch (const TypeError& e) {
    return fail(MXMOE_TYPE_ERROR, e.what());
  } catch (const ValueError& e) {
    return fail(MXMOE_VALUE_ERROR, e.what());
  } catch (const std::bad_alloc&) {
    return fail(MXMOE_OUT_OF_MEMORY, "no working memory is to be had");
  } catch (const std::system_error& e) {  // of std::thread, whose only reason is a lack
    return fail(MXMOE_OUT_OF_MEMORY, e.what());
  } catch (const std::exception& e) {
    return fail(MXMOE_INTERNAL_ERROR, e.what());
  } catch (...) {
    return fail(MXMOE_INTERNAL_ERROR, "an unknown exception");
  }
}

enum class Access { kRead, kWrite };

// Throw TypeError or ValueError naming the argument. What is NULL is an error, or an empty Tensor where it is
// optional.
Tensor required(const char* name, const mxmoe_tensor* tensor, Access access = Access::kRead);
Tensor optional(const char* name, const mxmoe_tensor* tensor, Access access = Access::kRead);

Activations parse_activations(int activations);

template <typename T>
T& pointed(const char* name, T* pointer) {
  if (pointer == nullptr) throw TypeError(concat(name, " is NULL; wanted a pointer"));
  return *pointer;
}

}  // namespace mxmoe::capi
